"""Steps under way at once, requests held for another replica's, and what followers are told."""

import numpy as np
import pytest

from services.worker.engine.interface import EngineRequest, LiveState
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler
from services.worker.engine.torch_engine.kv_cache import BlockTable, KvBlocks
from services.worker.engine.torch_engine.sequences import Chunk, Sequence
from services.worker.engine.torch_engine.step_plan import PlanReader, PlanWriter, plan_bytes_max
from shared.messages.requests import SamplingParams


def make(*, blocks: int = 20, running: int = 4, micro_batches: int = 1) -> BatchScheduler:
    kv = KvBlocks(blocks=blocks, block_tokens=4, rows=running, row_tokens_max=40)
    return BatchScheduler(
        kv, batch_tokens_max=16, running_max=running, waiting_max=3, micro_batches=micro_batches
    )


def request(key: str, prompt: int) -> EngineRequest:
    sampling = SamplingParams(output_tokens_max=20)
    return EngineRequest(key=key, prompt_tokens=[1] * prompt, sampling=sampling)


def state(key: str, prompt: int, *, output: int, computed: int) -> LiveState:
    return LiveState(request=request(key, prompt), output_tokens=[2] * output, computed=computed)


def commit(scheduler: BatchScheduler, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        samples = chunk.samples and scheduler.is_live(chunk.sequence)
        scheduler.commit(chunk)
        if samples:
            chunk.sequence.tokens.append(2)
    scheduler.check()


def test_steps_under_way_share_the_requests() -> None:
    """Otherwise one stage of a pipeline would work while the others wait."""
    scheduler = make(micro_batches=2)
    for key in "abcd":
        scheduler.add(Sequence(request(key, 4)))
    one, two = scheduler.schedule(), scheduler.schedule()
    assert [[chunk.sequence.request.key for chunk in step] for step in (one, two)] == [
        ["a", "b"], ["c", "d"],
    ]  # fmt: skip
    assert scheduler.schedule() == [], "nothing may run twice at once"
    commit(scheduler, one)
    assert [chunk.sequence.request.key for chunk in scheduler.schedule()] == ["a", "b"]


def test_removed_in_flight_keeps_its_blocks_until_the_step_ends() -> None:
    """Otherwise another request would get blocks that a step still writes to."""
    scheduler = make()
    scheduler.add(Sequence(request("a", 8)))
    chunks = scheduler.schedule()
    assert scheduler.remove("a")
    assert scheduler.kv.used == 2
    scheduler.check()
    commit(scheduler, chunks)
    assert scheduler.kv.used == 0


def test_held_requests_run_once_released_before_those_that_wait() -> None:
    """Otherwise a request in the middle of its answer would queue behind new ones."""
    scheduler = make(running=2)
    assert scheduler.take(state("a", 8, output=3, computed=10)) is not None
    scheduler.add(Sequence(request("new", 3)))
    assert scheduler.take(state("waiting", 5, output=0, computed=0)) == []
    assert [chunk.sequence.request.key for chunk in scheduler.schedule()] == ["new"]
    assert list(scheduler.held) == ["a", "waiting"]
    assert [s.request.key for s in scheduler.release_held(keep=True)] == ["a", "waiting"]
    scheduler.check()
    assert [s.request.key for s in scheduler.states()] == ["new", "a", "waiting"]
    (chunk,) = scheduler.schedule()
    assert (chunk.sequence.request.key, chunk.start, chunk.count) == ("a", 10, 1)


def test_taken_again_a_request_grows_and_keeps_its_blocks() -> None:
    """Otherwise what was copied ahead would have to be copied again."""
    scheduler = make()
    first = scheduler.take(state("a", 8, output=1, computed=8))
    second = scheduler.take(state("a", 8, output=9, computed=16))
    assert first is not None
    assert second is not None
    assert len(second) == 5
    assert second[: len(first)] == first
    scheduler.check()
    assert scheduler.forget_held("a")
    assert scheduler.kv.used == 0


def test_what_does_not_fit_is_not_held() -> None:
    """Otherwise a takeover could fail a replica that serves."""
    scheduler = make(blocks=4)
    assert scheduler.take(state("a", 8, output=1, computed=8)) is not None
    assert scheduler.take(state("b", 8, output=1, computed=8)) is None
    assert list(scheduler.held) == ["a"]
    scheduler.release_held(keep=False)
    assert scheduler.kv.used == 0
    scheduler.check()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_followers_build_the_leaders_plan_from_what_has_changed(micro_batches: int) -> None:
    """Otherwise ranks would read and write different KV blocks."""
    scheduler = make(blocks=12, micro_batches=micro_batches)
    writer = PlanWriter(scheduler.kv)
    reader = PlanReader(BlockTable(blocks=12, block_tokens=4, rows=4, row_tokens_max=40))
    limit = plan_bytes_max(scheduler.kv, batch_tokens_max=16)
    for number in range(40):
        if scheduler.waiting < 2:
            scheduler.add(Sequence(request(f"r{number}", 1 + 5 * number % 13)))
        chunks = scheduler.schedule()
        plan = writer.plan(chunks)
        data = writer.encode(plan, chunks)
        assert len(data) <= limit
        told = reader.decode(data)
        for field in ("rows", "starts", "counts", "samples", "tokens"):
            assert np.array_equal(getattr(told, field), getattr(plan, field))
        for chunk in chunks:
            count = scheduler.kv.count(chunk.row)
            ours = scheduler.kv.table[chunk.row, :count]
            assert np.array_equal(reader.table.table[chunk.row, :count], ours)
        commit(scheduler, chunks)
        for chunk in chunks:
            if len(chunk.sequence.tokens) >= chunk.sequence.tokens_max - number % 7:
                scheduler.remove(chunk.sequence.request.key)
    assert scheduler.preemptions, "rows must change hands"


def test_what_is_only_copied_ahead_gives_way() -> None:
    """Otherwise a switch that is being prepared, for minutes perhaps, would stop the replica that
    stays: its own requests would lose their blocks, or wait for those of others."""
    scheduler = make(blocks=8, running=3)
    scheduler.add(Sequence(request("own", 3)))
    commit(scheduler, scheduler.schedule())
    assert scheduler.take(state("first", 8, output=1, computed=8), ahead=True) is not None
    assert scheduler.take(state("newest", 8, output=1, computed=8), ahead=True) is not None
    while "newest" in scheduler.held:
        commit(scheduler, scheduler.schedule())
    assert (scheduler.running, scheduler.preemptions, list(scheduler.held)) == (1, 0, ["first"])
    scheduler.add(Sequence(request("arrives", 12)))
    keys = [chunk.sequence.request.key for chunk in scheduler.schedule()]
    assert keys == ["own", "arrives"], "it waits for what is copied ahead"
    assert not scheduler.held
    scheduler.check()


def test_rows_that_are_only_copied_ahead_give_way() -> None:
    """Otherwise a replica that stays could not admit a request, though it runs few."""
    scheduler = make(running=2)
    for key in "ab":
        assert scheduler.take(state(key, 4, output=1, computed=4), ahead=True) is not None
    scheduler.add(Sequence(request("own", 3)))
    assert not scheduler.stuck
    assert [chunk.sequence.request.key for chunk in scheduler.schedule()] == ["own"]
    assert list(scheduler.held) == ["a"]
    assert scheduler.take(state("b", 4, output=1, computed=4)) is not None, "final: a gives way"
    assert list(scheduler.held) == ["b"]
    scheduler.check()


def test_nothing_gives_way_in_vain() -> None:
    """Otherwise what was copied would be lost, and nobody could run for it."""
    scheduler = make(blocks=10)
    assert scheduler.take(state("final", 20, output=1, computed=20)) is not None
    assert scheduler.take(state("ahead", 4, output=1, computed=4), ahead=True) is not None
    scheduler.add(Sequence(request("long", 20)))
    assert scheduler.schedule() == []
    assert scheduler.stuck
    assert list(scheduler.held) == ["final", "ahead"]


def test_one_that_lacks_a_block_keeps_what_was_copied_ahead() -> None:
    """Otherwise all of it would be copied again as soon as a block is free."""
    scheduler = make(blocks=7)
    scheduler.add(Sequence(request("own", 7)))
    commit(scheduler, scheduler.schedule())
    first = scheduler.take(state("a", 12, output=1, computed=12), ahead=True)
    assert first is not None
    assert scheduler.take(state("a", 12, output=5, computed=16), ahead=True) == first
    scheduler.check()
    scheduler.remove("own")
    again = scheduler.take(state("a", 12, output=5, computed=16), ahead=True)
    assert again is not None
    assert (len(again), again[: len(first)]) == (5, first)
    scheduler.check()


def test_running_requests_wait_for_held_ones_no_longer_than_these_are_held() -> None:
    """Otherwise a switch could lose blocks that hold what was handed over, or hang a replica that
    stays: what runs goes on as far as it can, then waits without work, then goes on."""
    scheduler = make(blocks=8)
    for key in ("old", "young"):
        scheduler.add(Sequence(request(key, 3)))
    commit(scheduler, scheduler.schedule())
    assert scheduler.take(state("held", 12, output=1, computed=12)) is not None
    assert (scheduler.kv.free, scheduler.stuck) == (2, False)
    while not scheduler.stuck:
        chunks = scheduler.schedule()
        assert chunks, "it says that there is work"
        commit(scheduler, chunks)
    assert scheduler.schedule() == []
    assert (scheduler.running, scheduler.waiting) == (1, 1), "the youngest has given way"
    assert list(scheduler.held) == ["held"]
    scheduler.release_held(keep=True)
    assert not scheduler.stuck
    for _ in range(200):
        chunks = scheduler.schedule()
        commit(scheduler, chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            if len(sequence.tokens) == sequence.tokens_max:
                scheduler.remove(sequence.request.key)
    assert not list(scheduler)
    assert scheduler.kv.used == 0


def test_who_waits_for_held_ones_has_no_work() -> None:
    """Otherwise the worker would step for nothing, as fast as it can."""
    scheduler = make(blocks=8, running=1)
    assert scheduler.take(state("held", 4, output=1, computed=4)) is not None
    scheduler.add(Sequence(request("new", 4)))
    assert scheduler.stuck, "the only row is taken"
    scheduler.release_held(keep=False)
    assert not scheduler.stuck
    assert scheduler.schedule()
