"""The engine contract, run on every engine.

To add an engine, add a function to ``CASES`` that makes its EngineCase.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from services.worker.engine.interface import Engine
from services.worker.engine.modelled import ModelledEngine
from shared.mesh import ModelledEngineSettings
from shared.text import byte_tokenizer, load_tokenizer
from tests.unit.engine_contract import SOURCE, EngineCase, EngineContract, EngineLimits
from tests.unit.takeover_contract import TakeoverContract


def torch_case(folder: Path, *, shape: str = "") -> EngineCase:
    """``shape``: of a replica whose ranks are threads; one of its own without."""
    pytest.importorskip("torch", reason="needs the torch extra")
    from services.worker.engine.torch_engine.config import TorchEngineConfig
    from services.worker.engine.torch_engine.engine import load_torch_engine
    from services.worker.engine.torch_engine.make_model import make_model
    from tests.support.rank_threads import ThreadReplica

    make_model(folder, "nano")

    def config(limits: EngineLimits) -> TorchEngineConfig:
        return TorchEngineConfig(
            threads=1,
            running_max=limits.running_max,
            waiting_max=limits.waiting_max,
            batch_tokens_max=limits.batch_tokens_max,
            kv_blocks=limits.kv_blocks,
            block_tokens=limits.block_tokens,
            context_tokens_max=limits.context_tokens_max,
        )

    def make(limits: EngineLimits) -> Engine:
        if not shape:
            return load_torch_engine(folder, config(limits))
        return ThreadReplica(folder, shape, config(limits)).engine

    def pair(one: EngineLimits, other: EngineLimits) -> tuple[Engine, Engine]:
        first = ThreadReplica(folder, shape, config(one), name="a", replica_id=SOURCE)
        second = ThreadReplica(folder, TAKERS[shape], config(other), name="b", replica_id=SOURCE)
        first.expect_from(second)
        second.expect_from(first)
        return first.engine, second.engine

    return EngineCase(make, load_tokenizer(str(folder)), pair if shape in TAKERS else None)


def modelled_case(_: Path, *, prefix_caching: bool = False) -> EngineCase:
    def make(limits: EngineLimits) -> Engine:
        settings = ModelledEngineSettings(
            running_max=limits.running_max,
            waiting_max=limits.waiting_max,
            batch_tokens_max=limits.batch_tokens_max,
            kv_blocks=limits.kv_blocks,
            block_tokens=limits.block_tokens,
            eos_probability=0.02,
            prefix_caching=prefix_caching,
        )
        return ModelledEngine(settings, context_tokens_max=limits.context_tokens_max)

    def pair(one: EngineLimits, other: EngineLimits) -> tuple[Engine, Engine]:
        return make(one), make(other)

    return EngineCase(make, byte_tokenizer(), pair)


SHAPES = ("tp1", "tp2", "tp3", "tp1pp2", "tp2pp2")
TAKERS = {"tp1": "tp2", "tp2": "tp1pp2", "tp3": "tp2", "tp1pp2": "tp1", "tp2pp2": "tp3"}
"""Of what shape the replica is that takes over from one of each."""
CASES: dict[str, Callable[[Path], EngineCase]] = {
    "torch": torch_case,
    **{f"torch {shape}": partial(torch_case, shape=shape) for shape in SHAPES},
    "modelled": modelled_case,
    "modelled, prefix caching": partial(modelled_case, prefix_caching=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineCase]:
    @cache
    def make(name: str) -> EngineCase:
        return CASES[name](tmp_path_factory.mktemp(name))

    return make


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.torch] * name.startswith("torch")) for name in CASES],
)
class TestEngineContract(EngineContract, TakeoverContract):
    @pytest.fixture
    def case(self, made: Callable[[str], EngineCase], name: str) -> EngineCase:
        return made(name)
