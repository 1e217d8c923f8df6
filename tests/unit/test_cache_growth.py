"""KV caches that grow, as both batch schedulers count them, and as a worker's core is told."""

import pytest

from services.worker.engine.batching import Batch
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.events import GROW
from shared.core import Start
from shared.cost.limits import EngineLimits
from shared.errors import Rejected
from shared.mesh import ModelledEngineSettings
from shared.messages.replicas import GrowCache, PauseReplica, PrepareReplica, StopReplica
from services.worker.engine.modelled_timing import SettingsTimes
from tests.worker_driver import WORKER, DrivenWorker, spec

LIMITS = EngineLimits(block_tokens=4, batch_tokens_max=64, running_max=4, waiting_max=4)
SERVED = spec("r1")


def batch(*, small: int, full: int) -> Batch:
    times = SettingsTimes(ModelledEngineSettings(), gpus=1)
    return Batch(LIMITS, times, kv_blocks=small, kv_blocks_full=full)


def perform(counted: Batch) -> list[str]:
    """All that can be done; who ended."""
    ended: list[str] = []
    while counted.plan() is not None:
        ended += [sequence.key for sequence in counted.advance().ended]
        counted.check()
    return ended


def test_what_fits_only_later_may_be_tried_again() -> None:
    """Told that it is too long, its client would give up for no reason."""
    counted = batch(small=4, full=8)
    with pytest.raises(Rejected, match="overloaded"):
        counted.add("a", prompt_tokens=20, output_tokens=4)
    with pytest.raises(Rejected, match="too_long"):
        counted.add("a", prompt_tokens=40, output_tokens=4)
    counted.grow()
    counted.add("a", prompt_tokens=20, output_tokens=4)
    assert perform(counted) == ["a"]


def test_taken_over_it_waits_for_room() -> None:
    """Neither lost nor in the way of the invariants: it has nowhere else to go."""
    counted = batch(small=4, full=8)
    counted.hold("big", prompt_tokens=20, output_tokens=4, earlier_tokens=1, computed_tokens=20)
    counted.hold("grows", prompt_tokens=10, output_tokens=15, earlier_tokens=1, computed_tokens=10)
    assert counted.held["grows"].computed
    assert not counted.held["big"].computed
    counted.release(keep=True)
    assert perform(counted) == []
    assert counted.stuck
    assert counted.preemptions == 1, "it ran for as long as it could"
    counted.grow()
    assert not counted.stuck
    assert sorted(perform(counted)) == ["big", "grows"]


def test_what_never_fits_is_refused() -> None:
    """Otherwise it would wait in vain, and everybody behind it."""
    counted = batch(small=4, full=8)
    with pytest.raises(Rejected, match="too_long"):
        counted.hold("a", prompt_tokens=40, output_tokens=4)


def test_a_pool_of_blocks_uses_new_ones_last() -> None:
    """What is copied in the next growth, or switch, stays small as long as it can."""
    kv = KvBlocks(blocks=3, blocks_full=6, block_tokens=4, rows=2, row_tokens_max=24)
    row = kv.open()
    assert kv.reach == 0
    assert kv.grow(row, tokens=5)
    assert not kv.grow(row, tokens=13)
    assert kv.reach == 2
    kv.extend()
    kv.check()
    assert kv.grow(row, tokens=24), "rows are as wide as the full cache"
    assert kv.blocks(row) == list(range(6))
    kv.check()


def grow(epoch: int = 1) -> GrowCache:
    return GrowCache(epoch=epoch, worker_id=WORKER, replica_id="r1")


def _orders(worker: DrivenWorker) -> int:
    """How often the engine was told to grow, by the last event."""
    return sum(isinstance(e, Start) and e.job == GROW for e in worker.effects)
