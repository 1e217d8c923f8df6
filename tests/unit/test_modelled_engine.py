"""What the modelled engine does beyond the contract that all engines share."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.worker.engine.factory import Building, engine_factory
from services.worker.engine.interface import EngineRequest
from services.worker.engine.modelled import ModelledEngine
from services.worker.engine.torch_engine.make_model import make_model
from services.worker.events import EngineStart
from shared.errors import ConfigInvalid
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SamplingParams
from shared.models import ModelSpec
from shared.text import byte_tokenizer

SETTINGS = ModelledEngineSettings(
    base_s=0.01,
    prefill_token_s=0.001,
    decode_token_s=0.002,
    context_token_s=0.0001,
    batch_tokens_max=32,
    running_max=4,
    kv_blocks=64,
)


def engine(*, gpus: int = 1, **changes: Any) -> ModelledEngine:
    settings = msgspec.structs.replace(SETTINGS, **changes)
    return ModelledEngine(settings, context_tokens_max=1024, gpus=gpus)


def request(key: str = "a", *, prompt: int = 10, tokens: int = 4) -> EngineRequest:
    sampling = SamplingParams(output_tokens_max=tokens)
    return EngineRequest(key=key, prompt_tokens=[65] * prompt, sampling=sampling)


def test_step_time_follows_the_cost_model() -> None:
    """Otherwise demos and what-if answers would show times that nobody asked for."""
    one = engine()
    one.add(request(prompt=10))
    assert one.step().duration_s == pytest.approx(0.01 + 10 * 0.001 + 10 * 0.0001)
    assert one.step().duration_s == pytest.approx(0.01 + 0.002 + 11 * 0.0001)


def test_shapes_and_speedup_scale_what_they_should() -> None:
    """Otherwise unlike replicas would all be alike."""
    wide, fast = engine(gpus=2), engine(speedup=10.0)
    for one in (wide, fast):
        one.add(request(prompt=10))
    assert wide.step().duration_s == pytest.approx(0.01 + (0.01 + 0.001) / 2)
    assert fast.step().duration_s == pytest.approx((0.01 + 0.01 + 0.001) / 10)
    assert wide.load().kv_blocks_total == 2 * SETTINGS.kv_blocks


def test_long_prompts_are_prefilled_in_chunks_beside_decodes() -> None:
    """Otherwise a long prompt would stop everybody's stream, as without chunked prefill."""
    one = engine()
    one.add(request("short", prompt=5, tokens=20))
    one.step()
    one.add(request("long", prompt=100))
    made = {"short": 0, "long": 0}
    for _ in range(3):  # 31 + 31 + 31 of 100 tokens
        for chunk in one.step().chunks:
            made[chunk.key] += 1
    assert made == {"short": 3, "long": 0}
    assert [chunk.key for chunk in one.step().chunks] == ["short", "long"]


def test_youngest_is_preempted_when_blocks_run_out() -> None:
    """Otherwise a full cache would block all, or disturb who came first."""
    one = engine(kv_blocks=4, block_tokens=4)
    one.add(request("old", prompt=4, tokens=12))
    one.add(request("young", prompt=4, tokens=12))
    order: list[str] = []
    while one.has_work:
        order += [chunk.key for chunk in one.step().chunks if chunk.finish]
        one.check()
    assert order == ["old", "young"]
    assert one.preemptions >= 1


def test_tokens_are_text() -> None:
    """Otherwise demos would print noise, and stop strings would never match."""
    one = engine()
    one.add(request(tokens=200))
    tokens: list[int] = []
    while one.has_work:
        tokens += [token for chunk in one.step().chunks for token in chunk.tokens]
    text = byte_tokenizer().decode(tokens)
    assert text.isascii()
    assert text.isprintable()
    assert len(text.split()) > 10


def test_other_shapes_and_batches_make_the_same_tokens() -> None:
    """Otherwise a request that moves to an unlike replica would change its text."""
    texts: set[tuple[int, ...]] = set()
    for one in (engine(), engine(gpus=4, batch_tokens_max=8, kv_blocks=8, block_tokens=8)):
        one.add(request(prompt=30, tokens=20))
        tokens: list[int] = []
        while one.has_work:
            tokens += [token for chunk in one.step().chunks for token in chunk.tokens]
        texts.add(tuple(tokens))
    assert len(texts) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"base_s": -1.0},
        {"speedup": 0.0},
        {"eos_probability": 1.5},
        {"kv_blocks": 0},
        {"batch_tokens_max": 3, "running_max": 4},
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any]) -> None:
    """Otherwise a bad topology would show as a worker that hangs."""
    with pytest.raises(ConfigInvalid, match=next(iter(changes))):
        engine(**changes)


class TestFactory:
    def test_modelled_replica_gets_the_shape_of_its_plan(self) -> None:
        """Otherwise the plan's parallelism would change nothing."""
        factory = engine_factory(MeshConfig(engine=EngineSpec(modelled=SETTINGS)))
        spec = ReplicaSpec(
            replica_id="r", model_id="modelled", parallelism="tp2pp1", gpus=("n0-g0", "n0-g1")
        )
        assert (
            factory.build(EngineStart(spec, 1), Building()).load().kv_blocks_total
            == 2 * SETTINGS.kv_blocks
        )

    def test_unknown_torch_setting_is_refused_at_start(self) -> None:
        """Otherwise a typing error would show only when a plan starts a replica."""
        spec = EngineSpec(kind="torch", torch={"kv_block": 3})
        with pytest.raises(ConfigInvalid, match="kv_block"):
            engine_factory(MeshConfig(engine=spec))

    @pytest.mark.torch
    def test_torch_settings_may_come_as_text(self, tmp_path: Path) -> None:
        """--set and OSERVE_ variables are text: no number of the engine could be overridden."""
        pytest.importorskip("torch", reason="needs the torch extra")
        make_model(tmp_path / "m", size="tiny")
        model = ModelSpec(model_id="m", path=str(tmp_path / "m"), context_tokens_max=1024)
        spec = EngineSpec(kind="torch", torch={"running_max": "16"})
        assert engine_factory(MeshConfig(engine=spec, model=model)).running_max == 16
        spec = EngineSpec(kind="torch", torch={"running_max": "many"})
        with pytest.raises(ConfigInvalid, match=r"mesh\.engine\.torch\.running_max"):
            engine_factory(MeshConfig(engine=spec, model=model))

    @pytest.mark.torch
    def test_torch_replica_of_many_gpus_is_refused(self, tmp_path: Path) -> None:
        """Otherwise it would run on one GPU while the scheduler counts on two."""
        pytest.importorskip("torch", reason="needs the torch extra")
        make_model(tmp_path / "m", size="tiny")
        model = ModelSpec(model_id="m", path=str(tmp_path / "m"))
        mesh = MeshConfig(engine=EngineSpec(kind="torch"), model=model)
        spec = ReplicaSpec(replica_id="r", model_id="m", parallelism="tp2pp1", gpus=("a", "b"))
        with pytest.raises(ConfigInvalid, match="one device"):
            engine_factory(mesh).build(EngineStart(spec, 1), Building())

    @pytest.mark.torch
    def test_a_longer_context_than_the_checkpoints_is_refused(self, tmp_path: Path) -> None:
        """The ingress would admit prompts that every engine then refuses."""
        pytest.importorskip("torch", reason="needs the torch extra")
        make_model(tmp_path / "m", size="tiny")
        model = ModelSpec(model_id="m", path=str(tmp_path / "m"), context_tokens_max=1 << 20)
        with pytest.raises(ConfigInvalid, match="context_tokens_max"):
            engine_factory(MeshConfig(engine=EngineSpec(kind="torch"), model=model))
