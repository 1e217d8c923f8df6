"""The modelled engine timed by profiles: what it takes from them, and how it says what is wrong."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.worker.engine.factory import Building, engine_factory
from services.worker.engine.interface import EngineRequest
from services.worker.engine.modelled_timing import modelled_replica
from services.worker.events import EngineStart
from shared.cost import library
from shared.cost.files import write_gpu, write_profile
from shared.cost.links import start_s
from shared.cost.memory import kv_capacity_tokens
from shared.cost.step import PS_PER_S, Prefill, pairs, step_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SamplingParams
from shared.models import ModelSpec
from tests.support.costs import small_gpu, small_profile

SETTINGS = ModelledEngineSettings(
    timing="profile", batch_tokens_max=32, running_max=4, block_tokens=4
)


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of GPU that has a profile of model ``small``, and of no other."""
    gpu = f"toy-{tmp_path.name}"  # what was read is kept by name
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    (tmp_path / gpu).mkdir()
    write_gpu(tmp_path / gpu / "gpu.toml", msgspec.structs.replace(small_gpu(), gpu=gpu))
    profile = msgspec.structs.replace(small_profile(), gpu=gpu)
    write_profile(tmp_path / gpu / "small.toml", profile)
    return gpu


def mesh(kind: str, *wishes: ReplicaWish, profile: str = "small", **changes: Any) -> MeshConfig:
    return MeshConfig(
        model=ModelSpec(model_id="m", profile=profile),
        engine=EngineSpec(modelled=msgspec.structs.replace(SETTINGS, **changes)),
        nodes=tuple(NodeSpec(node_id=f"n{n}", gpus=2, gpu_kind=kind) for n in range(2)),
        replicas=wishes,
    )


def spec(shape: str, *gpus: str) -> ReplicaSpec:
    return ReplicaSpec(replica_id="r", model_id="m", parallelism=shape, gpus=gpus)


def test_times_blocks_and_start_are_the_profiles(kind: str) -> None:
    """Otherwise an emulated cluster would be some other one."""
    factory = engine_factory(mesh(kind, speedup=2.0))
    replica = spec("tp2", "n0-g0", "n0-g1")
    shape, gpu, profile = Parallelism(tp=2), small_gpu(), small_profile()
    engine = factory.build(EngineStart(replica, 1), Building())
    capacity = kv_capacity_tokens(profile, gpu, shape)
    assert engine.load().kv_blocks_total == capacity // 4 > 0
    assert factory.start_s(EngineStart(replica, 1)) == start_s(profile, gpu, shape) / 2
    engine.add(
        EngineRequest(
            key="a", prompt_tokens=[65] * 40, sampling=SamplingParams(output_tokens_max=3)
        )
    )
    times = step_model(profile, gpu, shape, speedup=2.0)
    for work in (Prefill(32, 1, pairs(0, 32), 0), Prefill(8, 1, pairs(32, 8), 1)):
        assert engine.step().duration_s == times.step_ps(0, 0, work) / PS_PER_S
    assert engine.step().duration_s == times.decode(1).total_ps(40, 1) / PS_PER_S
    assert engine.step().duration_s == times.decode(1).total_ps(41, 1) / PS_PER_S
    assert not engine.has_work


def test_replicas_that_span_nodes_pay_for_it(kind: str) -> None:
    """Otherwise tensor parallelism over the network would look as good as over NVLink."""
    config = mesh(kind)
    near = modelled_replica(config, spec("tp2", "n0-g0", "n0-g1")).times
    far = modelled_replica(config, spec("tp2", "n0-g0", "n1-g0")).times
    assert far.decode(1).fixed_ps > near.decode(1).fixed_ps


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"kind": "tpu"}, r"mesh\.nodes\.n0\.gpu_kind"),
        ({"profile": "smal"}, r"mesh\.model\.profile.*small"),
        ({"base_s": 1.0}, r"mesh\.engine\.modelled\.base_s.*remove it"),
        ({"wish": "tp4"}, r"mesh\.replicas\.r\.parallelism"),
        ({"wish": "tp1pp2", "gpus": ("n0-g0", "n9-g0")}, r"gpu = 'n9-g0'"),
    ],
)
def test_what_cannot_be_looked_up_is_named(kind: str, config: dict[str, Any], field: str) -> None:
    """Otherwise a typing error would show as replicas that fail to start, one after the other."""
    changes = {"kind": kind} | config
    wishes: list[ReplicaWish] = []
    if shape := changes.pop("wish", None):
        gpus = changes.pop("gpus", ())
        wishes.append(ReplicaWish(replica_id="r", parallelism=shape, gpus=gpus))
    with pytest.raises(ConfigInvalid, match=field):
        engine_factory(mesh(changes.pop("kind"), *wishes, **changes))


def test_a_topology_without_nodes_has_nothing_to_look_up(kind: str) -> None:
    """Otherwise a worker of a mesh without GPUs would fail much later, at its first replica."""
    with pytest.raises(ConfigInvalid, match=r"mesh\.nodes"):
        engine_factory(msgspec.structs.replace(mesh(kind), nodes=()))


def test_gpus_of_several_kinds_are_no_replica(kind: str) -> None:
    """A profile is of one kind: times of the first would be claimed for the slower one."""
    config = mesh(kind)
    mixed = msgspec.structs.replace(config.nodes[1], gpu_kind="other")
    config = msgspec.structs.replace(config, nodes=(config.nodes[0], mixed))
    with pytest.raises(ConfigInvalid, match="one kind of GPU"):
        modelled_replica(config, spec("tp2", "n0-g0", "n1-g0"))


def test_prefix_caching_shortens_the_second_prompt(kind: str) -> None:
    """Otherwise the setting would do nothing in the engine that hashes its prompts itself."""
    for caching, quicker in ((True, True), (False, False)):
        start = EngineStart(spec("tp1", "n0-g0"), 1)
        engine = engine_factory(mesh(kind, prefix_caching=caching)).build(start, Building())
        took: list[float] = []
        for key, last in (("a", 65), ("b", 66)):
            sampling = SamplingParams(output_tokens_max=1)
            tokens = [*range(1, 24), last]
            engine.add(EngineRequest(key=key, prompt_tokens=tokens, sampling=sampling))
            took.append(engine.step().duration_s)
            assert not engine.has_work
        assert (took[1] < took[0]) is quicker
