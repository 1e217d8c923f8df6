"""How long bytes of a simulated live switch are on their way."""

import pytest

from loadgen.simulator.shapes import Copies, model_shapes
from shared.cost.library import gpu_facts, load_profile
from shared.errors import ConfigInvalid
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.models import ModelSpec
from shared.placement.copies import DISK

MODEL, KIND, SIZE = "llama-3.1-8b", "h100", 10**10


def mesh(timing: str) -> MeshConfig:
    settings = ModelledEngineSettings(timing="profile") if timing == "profile" else None
    return MeshConfig(
        model=ModelSpec(model_id="m", profile=MODEL),
        engine=EngineSpec(modelled=settings or ModelledEngineSettings()),
        nodes=tuple(NodeSpec(node_id=f"n{i}", gpus=2, gpu_kind=KIND) for i in range(2)),
    )


@pytest.fixture(autouse=True)
def profiled() -> None:
    try:
        load_profile(KIND, MODEL)
    except ConfigInvalid as error:
        pytest.skip(f"no cost profile: {error}")


def test_every_byte_takes_its_link() -> None:
    """Switches across nodes, or from disk, would be as fast as within one GPU."""
    copies, facts = Copies(mesh("profile")), gpu_facts(KIND)
    ways = {
        "n0-g0": facts.local, "n0-g1": facts.peer, "n1-g0": facts.network, DISK: facts.disk,
    }  # fmt: skip
    took = {source: copies.seconds("n0-g0", {source: SIZE}) for source in ways}
    for source, link in ways.items():
        assert took[source] == pytest.approx(SIZE / link.bytes_per_s, rel=0.01)
    all_s = copies.seconds("n0-g0", dict.fromkeys(ways, SIZE))
    assert all_s == pytest.approx(sum(took.values())), "one after the other"
    assert copies.seconds("n0-g0", {"n0-g1": 0}) == 0.0


def test_only_profiles_tell_shapes() -> None:
    """A mesh whose engines take their times from settings has no weights that could move."""
    assert model_shapes(mesh("settings")) == {}
    assert model_shapes(mesh("profile"))["m"].layers == 32
