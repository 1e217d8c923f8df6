"""The batch scheduler's order of service, case by case."""

import pytest

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Sequence
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from shared.errors import Rejected
from shared.messages.requests import SamplingParams


def make(*, blocks: int = 100, budget: int = 10, running: int = 4) -> BatchScheduler:
    kv = KvBlocks(blocks=blocks, block_tokens=4, rows=running, row_tokens_max=200)
    return BatchScheduler(kv, batch_tokens_max=budget, running_max=running, waiting_max=3)


def sequence(key: str, prompt: int, output: int = 20) -> Sequence:
    return Sequence(
        EngineRequest(
            key=key,
            prompt_tokens=[1] * prompt,
            sampling=SamplingParams(output_tokens_max=output),
        )
    )


def step(scheduler: BatchScheduler) -> list[tuple[str, int, int]]:
    """The chunks as (key, start, count), computed and with a token where one is due."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        samples = chunk.samples
        scheduler.commit(chunk)
        if samples:
            chunk.sequence.tokens.append(2)
    scheduler.check()
    return [(chunk.sequence.request.key, chunk.start, chunk.count) for chunk in chunks]


def test_decodes_go_before_prefills() -> None:
    """Otherwise a long prompt would stall the streams of everyone else."""
    scheduler = make()
    scheduler.add(sequence("a", 3))
    assert step(scheduler) == [("a", 0, 3)]
    scheduler.add(sequence("long", 25))
    assert step(scheduler) == [("a", 3, 1), ("long", 0, 9)]
    assert step(scheduler) == [("a", 4, 1), ("long", 9, 9)]
    assert step(scheduler) == [("a", 5, 1), ("long", 18, 7)]
    assert step(scheduler) == [("a", 6, 1), ("long", 25, 1)]


def test_prefills_share_a_step_in_order_of_arrival() -> None:
    """Otherwise the budget would go unused, or later requests would overtake."""
    scheduler = make()
    for key, prompt in (("a", 4), ("b", 3), ("c", 8)):
        scheduler.add(sequence(key, prompt))
    assert step(scheduler) == [("a", 0, 4), ("b", 0, 3), ("c", 0, 3)]
    assert step(scheduler) == [("a", 4, 1), ("b", 3, 1), ("c", 3, 5)]


def test_youngest_gives_way_and_is_first_to_return() -> None:
    """Otherwise memory pressure would punish the oldest requests, or starve the preempted."""
    scheduler = make(blocks=4, budget=20)
    scheduler.add(sequence("old", 4, 9))
    scheduler.add(sequence("young", 4, 9))
    scheduler.add(sequence("later", 4, 5))
    assert step(scheduler) == [("old", 0, 4), ("young", 0, 4)]
    for position in range(4, 8):
        assert step(scheduler) == [("old", position, 1), ("young", position, 1)]
    assert step(scheduler) == [("old", 8, 1)]
    assert scheduler.preemptions == 1
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    assert scheduler.remove("old")
    assert step(scheduler) == [("young", 0, 9)]


def test_head_of_the_queue_is_not_overtaken() -> None:
    """Otherwise a long request would wait for ever behind short ones that fit."""
    scheduler = make(blocks=8, budget=40)
    scheduler.add(sequence("a", 16, 2))
    step(scheduler)
    scheduler.add(sequence("big", 20, 2))
    scheduler.add(sequence("small", 1, 2))
    assert step(scheduler) == [("a", 16, 1)]


def test_pending_tokens_count_prompt_and_output() -> None:
    """Otherwise the load that routers compare would be wrong."""
    scheduler = make()
    scheduler.add(sequence("a", 25, 20))
    assert scheduler.tokens_pending == 45
    step(scheduler)
    assert scheduler.tokens_pending == 35
    step(scheduler)
    step(scheduler)
    assert scheduler.tokens_pending == 19


def test_full_queue_refuses() -> None:
    """Otherwise the queue would grow without bound."""
    scheduler = make(running=1)
    for n in range(4):
        scheduler.add(sequence(f"r{n}", 2))
    with pytest.raises(Rejected, match="overloaded"):
        scheduler.add(sequence("r4", 2))
    assert scheduler.remove("r2")
    scheduler.add(sequence("r5", 2))
    scheduler.check()


def test_request_larger_than_the_cache_is_refused() -> None:
    """Otherwise it would wait at the head of the queue for ever; the very last token needs no
    room, since nothing follows it."""
    scheduler = make(blocks=4)
    with pytest.raises(Rejected, match="too_long"):
        scheduler.add(sequence("a", 10, 8))
    scheduler.add(sequence("b", 10, 7))
