"""The torch engine with its ranks in processes of their own, as workers have them."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from loadgen.bench.torch_ranks import started  # noqa: E402
from services.worker.engine.torch_engine.config import TorchEngineConfig  # noqa: E402
from services.worker.engine.torch_engine.ranks.lost import RankLost  # noqa: E402
from tests.unit.engine_contract import Output, finish_all, run, step  # noqa: E402
from tests.unit.torch_oracle import Oracle, greedy_request, make_oracle, prompt_of  # noqa: E402

pytestmark = pytest.mark.torch
OracleOf = Callable[[str], Oracle]
CONFIG = TorchEngineConfig(threads=1, kv_blocks=64)


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> OracleOf:
    @cache
    def make(family: str) -> Oracle:
        return make_oracle(tmp_path_factory.mktemp(family), family)

    return make


@pytest.mark.parametrize("shape", ["tp2", "tp1pp2"])
def test_greedy_output_is_that_of_transformers(oracle_of: OracleOf, shape: str) -> None:
    """Otherwise what threads compute together processes would not."""
    oracle = oracle_of("uneven")
    prompts = [prompt_of(length) for length in (1, 33, 100)]
    with started(oracle.folder, shape, CONFIG) as engine:
        outputs = run(engine, *(greedy_request(f"r{n}", p, 12) for n, p in enumerate(prompts)))
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 12)


@pytest.mark.parametrize("shape", ["tp2", "tp1pp2"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_fails_the_engine(oracle_of: OracleOf, shape: str, how: signal.Signals) -> None:
    """Otherwise requests on a replica that has lost a GPU would wait for ever: a dead rank is known
    by the end of its links, at once, and one that stands still by its silence."""
    before = set(multiprocessing.active_children())
    with started(oracle_of("uneven").folder, shape, CONFIG) as engine:
        (follower,) = set(multiprocessing.active_children()) - before
        outputs = {"a": Output(0)}
        engine.add(greedy_request("a", prompt_of(5), 400))
        step(engine, outputs)
        assert follower.pid is not None
        os.kill(follower.pid, how)
        try:
            with pytest.raises(RankLost) as lost:
                finish_all(engine, outputs)
            assert lost.value.rank == 1
            if how == signal.SIGSTOP:
                assert "silent for" in lost.value.reason
            else:
                assert any(word in lost.value.reason for word in ("gone", "left", "closed"))
            assert engine.drop_all() == ["a"]
        finally:
            follower.kill()
