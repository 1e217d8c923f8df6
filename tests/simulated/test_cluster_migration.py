"""A simulated cluster whose running requests move between replicas with their KV."""

import pytest

from loadgen.simulator.faults import Incident
from loadgen.simulator.policies import Policy, policy_named
from loadgen.workload.records import TraceRecord
from tests.simulated.test_cluster_faults import Watched
from tests.support.clusters import NEVER, mesh_of, spec_of

MOVING = Policy(name="moving", migration="llumnix")
"""Its router goes by weights, so that some replicas fill up before others."""


def uneven(requests: int = 240) -> list[TraceRecord]:
    """Long outputs that fill one replica's KV cache sooner than another's."""
    return [
        TraceRecord(
            timestamp_s=0.1 * number,
            input_tokens=40 + 900 * (number % 5 == 0),
            output_tokens=60 + 700 * (number % 3 == 0),
        )
        for number in range(requests)
    ]


CRASH = (Incident(kind="crash", node="n0-g1", at_s=15.0, for_s=8.0),)


@pytest.mark.parametrize("incidents", [(), NEVER, CRASH], ids=["hushed", "loud", "crash"])
def test_requests_that_move_lose_nothing(incidents: tuple[Incident, ...]) -> None:
    """A migration would lose or double tokens, or leave KV behind."""
    mesh = mesh_of(gpus=3, kv_blocks=350, running_max=64)
    spec = spec_of(mesh, uneven(), policy=MOVING, incidents=incidents)
    cluster = Watched(spec)
    cluster.boot()
    cluster.serve()
    assert cluster.migrator is not None
    assert cluster.migrator.migrations > 3
    assert (cluster.ended, cluster.source.columns.failed) == (240, {})
    for core in cluster.world.cores():
        core.check()
    for engines in [engines for engines in cluster.fleet if engines.port.alive]:
        for engine in engines.engines.values():
            assert engine.batch.kv.used == 0, "KV is left behind"
            assert not engine.runs
            assert not engine.away


def test_llumnix_migrates_and_hears_of_kv_as_it_fills() -> None:
    """The competitor would be compared without what it is known for."""
    hushed, loud = (
        Watched(spec_of(mesh_of(gpus=3), uneven(3), policy=policy_named("llumnix"), incidents=i))
        for i in ((), NEVER)
    )
    assert hushed.migrator is not None
    assert hushed.paces.pulse_s is loud.paces.pulse_s is None
