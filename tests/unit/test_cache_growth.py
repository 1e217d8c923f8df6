"""KV caches that grow, as both batch schedulers count them, and as a worker's core is told."""

import pytest

from services.worker.engine.batching import Batch
from services.worker.engine.interface import EngineLoad
from services.worker.engine.modelled_timing import SettingsTimes
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.events import EngineLoads, EngineReady, MeasuredEngine
from shared.cost.limits import EngineLimits
from shared.errors import Rejected
from shared.mesh import ModelledEngineSettings
from shared.messages.replicas import GrowCache, PauseReplica, WorkerReport
from tests.worker_driver import WORKER, DrivenWorker, prepare, spec, start

LIMITS = EngineLimits(block_tokens=4, batch_tokens_max=64, running_max=4, waiting_max=4)


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


def test_what_fits_only_later_waits() -> None:
    """Refused, its client would give up for no reason: the old replicas leave in a moment."""
    counted = batch(small=4, full=8)
    with pytest.raises(Rejected, match="too_long"):
        counted.add("a", prompt_tokens=40, output_tokens=4)
    counted.add("a", prompt_tokens=20, output_tokens=4)
    assert perform(counted) == []
    assert counted.stuck
    counted.grow()
    assert perform(counted) == ["a"]


def test_what_outgrows_a_small_cache_waits_for_the_rest_of_it() -> None:
    """It fits to begin with; its tokens are computed again once there is room for all."""
    counted = batch(small=4, full=8)
    counted.add("a", prompt_tokens=10, output_tokens=15)
    assert perform(counted) == []
    assert counted.stuck
    counted.grow()
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


def test_a_leader_that_serves_has_its_engine_grow() -> None:
    """In the middle of a switch others count on the blocks as they are; the command comes again."""
    worker = DrivenWorker()
    worker.feed(grow())
    assert not worker.sent, "what is not here any more needs no answer"
    worker.serve()
    worker.feed(grow())
    (order,) = worker.grown
    assert (order.replica_id, order.generation) == ("r1", 1)
    worker.feed(prepare(2, spec("r1"), source=("r0", "n0-g1")))
    worker.feed(grow(2))
    assert len(worker.grown) == 1, "it expects requests"
    worker.feed(start(3))
    worker.feed(grow(3))
    assert len(worker.grown) == 2
    worker.feed(PauseReplica(epoch=4, worker_id=WORKER, replica_id="r1"))
    worker.feed(grow(4))
    worker.settle_jobs()
    worker.feed(grow(4))
    assert len(worker.grown) == 2, "it stands still"


def test_what_a_rank_measures_is_told() -> None:
    """Otherwise the switcher would have it grow again and again."""
    worker = DrivenWorker(followers=True)
    both = spec("r1", "n0-g1", WORKER, parallelism="tp2pp1")
    worker.feed(start(1, both))
    worker.feed(EngineReady(replica_id="r1", generation=1, cache_bytes=5, cache_bytes_full=9))
    assert _told(worker) == (5, 9)
    grown = MeasuredEngine(replica_id="r1", generation=1, load=EngineLoad(), cache_bytes=9)
    worker.feed(EngineLoads(engines=(grown,)))
    assert _told(worker) == (9, 9)


def _told(worker: DrivenWorker) -> tuple[int, int]:
    worker.advance(0.6)
    [held] = worker.of(WorkerReport)[-1].replicas
    return held.cache_bytes, held.cache_bytes_full
