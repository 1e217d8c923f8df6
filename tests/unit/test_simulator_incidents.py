"""Incidents as an operator writes them."""

import pytest

from loadgen.simulator.faults import Incident
from loadgen.simulator.incidents import SLOW_FACTOR, parse_incident
from shared.errors import ConfigInvalid
from tests.support.clusters import mesh_of

MESH = mesh_of(gpus=2)


@pytest.mark.parametrize(
    ("text", "incident"),
    [
        ("crash:n0-g1@600+60", Incident(kind="crash", node="n0-g1", at_s=600.0, for_s=60.0)),
        ("stall:router@0+0.5", Incident(kind="stall", node="router", at_s=0.0, for_s=0.5)),
        ("partition:n0-g0@1.5+2", Incident(kind="partition", node="n0-g0", at_s=1.5, for_s=2.0)),
        ("slow:n0-g0@1+2*50", Incident(kind="slow", node="n0-g0", at_s=1, for_s=2, factor=50.0)),
    ],
)
def test_an_incident_is_what_it_says(text: str, incident: Incident) -> None:
    """Another GPU would die than the one named, or at another time."""
    parsed = parse_incident(text, MESH)
    assert (parsed.kind, parsed.node, parsed.at_s, parsed.for_s) == (
        incident.kind, incident.node, incident.at_s, incident.for_s,
    )  # fmt: skip
    if parsed.kind == "slow":
        assert parsed.factor == incident.factor
        assert parse_incident(text.partition("*")[0], MESH).factor == SLOW_FACTOR


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write KIND:NODE@START"),
        ("crash", "write KIND:NODE@START"),
        ("explode:n0-g0@1+1", "one of crash, stall, partition, slow"),
        ("twin:switcher@1+1", "one of crash, stall, partition, slow"),
        ("crash:n0-g0@-1+1", "write KIND:NODE@START"),
        ("crash:n0-g7@1+1", "n0-g7 is none of the GPUs n0-g0, n0-g1 nor one of the services"),
        ("crash:ingress@1+1", "ingress is none of"),
        ("crash:n0-g0@1.2.3+1", "1.2.3 is no number"),
        ("crash:n0-g0@1+0", "use 0.001 or more in place of 0"),
        ("crash:n0-g0@1+1*5", "only slow has a factor"),
        ("slow:n0-g0@1+1*0", "use 1 or more in place of 0"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(text: str, said: str) -> None:
    """A typing error would pass for a run without incidents, or for another incident."""
    with pytest.raises(ConfigInvalid) as caught:
        parse_incident(text, MESH)
    assert said in str(caught.value)
    assert "incident" in str(caught.value)
