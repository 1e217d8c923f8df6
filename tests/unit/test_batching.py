"""The batch scheduler that counts, on cases worked out by hand."""

import pytest

from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import PrefillWork, Progress
from shared.cost.limits import EngineLimits
from shared.cost.step import DecodeTimes, Prefill
from shared.errors import ConfigInvalid, Rejected

LIMITS = EngineLimits(block_tokens=4, batch_tokens_max=16, running_max=4, waiting_max=3)


class Times:
    """10 ps for a step, 1 for each token of context; remembers the last prefill."""

    prefill: Prefill = Prefill()

    def decode(self, batch: int, /) -> DecodeTimes:
        return DecodeTimes(batch, 10, 1)

    def step_ps(self, batch: int, context: int, prefill: PrefillWork, /) -> int:
        del batch
        self.prefill = prefill
        return 10 + context


def batch(*, kv_blocks: int = 100, caching: bool = False, times: Times | None = None) -> Batch:
    return Batch(LIMITS, times or Times(), kv_blocks=kv_blocks, prefix_caching=caching)


def step(one: Batch) -> Progress:
    progress = one.advance()
    one.check()
    return progress


def test_a_request_alone() -> None:
    """Otherwise TTFT and TPOT of an idle replica would be wrong, and so all others."""
    one = batch()
    sequence = one.add("a", prompt_tokens=6, output_tokens=5)
    plan = one.plan()
    assert plan is not None
    assert (plan.steps, plan.duration_ps) == (1, 10)
    assert step(one).first == [sequence]
    assert (one.made(sequence), one.computed(sequence)) == (1, 6)
    plan = one.plan()
    assert plan is not None
    assert (plan.steps, plan.duration_ps) == (4, 4 * 10 + 7 + 8 + 9 + 10)
    assert step(one).ended == [sequence]
    assert one.made(sequence) == 5
    assert one.plan() is None
    assert one.load().kv_blocks_used == 0


def test_a_leap_may_be_cut_at_any_step() -> None:
    """Otherwise who arrives in mid-leap would join at its end, or in the middle of a step."""
    one = batch()
    one.add("a", prompt_tokens=6, output_tokens=5)
    one.advance()
    assert [one.steps_until(elapsed) for elapsed in (0, 17, 18, 35, 36, 54, 55, 999)] == [
        (1, 17), (1, 17), (2, 35), (2, 35), (3, 54), (3, 54), (4, 74), (4, 74),
    ]  # fmt: skip
    one.advance(2)
    one.add("b", prompt_tokens=3, output_tokens=1)
    progress = step(one)
    assert (progress.steps, progress.decoding) == (1, 1)
    assert [s.key for s in progress.first] == [s.key for s in progress.ended] == ["b"]


def test_decodes_come_before_prompts_in_order_of_arrival() -> None:
    """Otherwise long prompts would stop everybody's stream, or overtake each other."""
    times = Times()
    one = batch(times=times)
    one.add("a", prompt_tokens=2, output_tokens=9)
    step(one)
    one.add("b", prompt_tokens=20, output_tokens=9)
    one.add("c", prompt_tokens=3, output_tokens=9)
    assert step(one).first == []  # 15 of b's 20
    assert times.prefill == PrefillWork(tokens=15, chunks=1, pairs=120, ending=0, context=15)
    assert [s.key for s in step(one).first] == ["b", "c"]
    pairs = 5 * 15 + 15 + 6
    assert times.prefill == PrefillWork(tokens=8, chunks=2, pairs=pairs, ending=2, context=23)
    assert one.steps_total == 3


def test_the_youngest_is_preempted_and_goes_on_first() -> None:
    """Otherwise a full cache would disturb who came first, or the preempted would starve."""
    one = batch(kv_blocks=4)
    one.add("old", prompt_tokens=4, output_tokens=9)
    one.add("young", prompt_tokens=4, output_tokens=9)
    one.add("late", prompt_tokens=4, output_tokens=1)
    assert [s.key for s in step(one).first] == ["old", "young"]  # a block to spare for each of them
    one = batch(kv_blocks=5)
    for key in ("old", "young"):
        one.add(key, prompt_tokens=4, output_tokens=9)
    step(one)
    one.add("late", prompt_tokens=4, output_tokens=1)
    plan = one.plan()
    assert plan is not None
    assert plan.steps == 4  # to 8 tokens each, in two blocks each; then two more are needed
    step(one)
    progress = step(one)
    assert [s.key for s in progress.preempted] == ["young"]
    assert [s.key for s in progress.ended] == ["old"]
    assert list(one.waiting) == ["young", "late"]
    resumed = step(one)
    assert [s.key for s in resumed.resumed] == ["young"]
    assert [s.key for s in resumed.first] == ["late"]
    assert one.preemptions == 1
    assert one.made(one.sequences["young"]) == 6


def test_what_can_never_fit_or_does_not_now_is_refused() -> None:
    """Otherwise a request would block the queue for ever, or the queue would grow without bound."""
    one = batch(kv_blocks=4)
    with pytest.raises(Rejected, match="too_long"):
        one.add("a", prompt_tokens=10, output_tokens=8)
    one.add("a", prompt_tokens=10, output_tokens=7)
    with pytest.raises(Rejected, match="invalid"):
        one.add("a", prompt_tokens=1, output_tokens=1)
    for n in range(6):
        one.add(str(n), prompt_tokens=1, output_tokens=1)
    with pytest.raises(Rejected, match="overloaded"):
        one.add("more", prompt_tokens=1, output_tokens=1)
    one.abort("3")
    one.add("more", prompt_tokens=1, output_tokens=1)
    one.check()


class TestPrefixCaching:
    def test_a_prefix_is_computed_and_stored_once(self) -> None:
        """Otherwise reuse would save no time, or be counted as memory twice."""
        times = Times()
        one = batch(caching=True, times=times)
        one.add("a", prompt_tokens=12, output_tokens=9, hashes=(1, 2, 3))
        step(one)
        assert one.load().kv_blocks_used == 3
        one.add("b", prompt_tokens=11, output_tokens=9, hashes=(1, 2, 4))
        step(one)
        assert times.prefill.tokens == 3
        assert times.prefill.pairs == 9 + 10 + 11
        assert one.hit_tokens_total == 8
        assert one.load().kv_blocks_used == 3 + 1 + 1  # a's first new token, b's own end

    def test_the_last_block_is_computed_even_if_all_is_known(self) -> None:
        """There is no first token without computing the last one of the prompt."""
        times = Times()
        one = batch(caching=True, times=times)
        for key in "ab":
            one.add(key, prompt_tokens=8, output_tokens=1, hashes=(1, 2))
            step(one)
        assert times.prefill == PrefillWork(tokens=4, chunks=1, pairs=26, ending=1, context=8)

    def test_who_comes_in_the_same_step_shares_already(self) -> None:
        """As in vLLM; a burst of alike prompts would be computed over and over."""
        one = batch(caching=True)
        one.add("a", prompt_tokens=10, output_tokens=2, hashes=(1, 2))
        one.add("b", prompt_tokens=10, output_tokens=2, hashes=(1, 2))
        assert [s.key for s in step(one).first] == ["a", "b"]
        assert one.prefill_tokens_total == 12
        assert one.load().kv_blocks_used == 2 + 1 + 1

    def test_what_is_not_in_use_makes_room_from_the_end(self) -> None:
        """Otherwise the cache would refuse requests, or forget the beginnings that most share."""
        one = batch(kv_blocks=6, caching=True)
        one.add("a", prompt_tokens=16, output_tokens=1, hashes=(1, 2, 3, 4))
        step(one)
        assert one.load().kv_blocks_used == 0
        assert one.kv.free == 6
        one.add("b", prompt_tokens=14, output_tokens=1, hashes=(9,))
        step(one)  # needs four blocks: 4 and 3 have to go
        assert [len(one.kv.cache.match(hashes)) for hashes in ((1, 2, 3), (9,))] == [2, 1]

    def test_a_preempted_request_finds_its_own_blocks(self) -> None:
        """Otherwise preemption would cost more here than in the engine it stands for."""
        one = batch(kv_blocks=6, caching=True)
        one.add("old", prompt_tokens=4, output_tokens=12, hashes=(1,))
        one.add("young", prompt_tokens=8, output_tokens=12, hashes=(2, 3))
        preempted: list[str] = []
        while one.plan() is not None:
            preempted += [s.key for s in step(one).preempted]
        assert preempted == ["young"]
        assert one.hit_tokens_total > 0

    def test_idle_blocks_go_before_anybody_is_preempted(self) -> None:
        """Otherwise the cache would keep what nobody uses and stop who runs."""
        one = batch(kv_blocks=6, caching=True)
        one.add("gone", prompt_tokens=8, output_tokens=1, hashes=(8, 9))
        step(one)
        for key in ("old", "young"):
            one.add(key, prompt_tokens=4, output_tokens=9)
        step(one)
        assert step(one).steps == 8  # to twelve tokens in three blocks each
        assert one.kv.cache.match((8,)) == []
        assert one.preemptions == 0
        one = batch(kv_blocks=6, caching=True)
        one.add("gone", prompt_tokens=4, output_tokens=1, hashes=(9,))
        step(one)
        one.add("old", prompt_tokens=8, output_tokens=9)
        one.add("young", prompt_tokens=4, output_tokens=9)
        step(one)
        assert one.kv.free == 3
        step(one)
        assert [s.key for s in step(one).preempted] == ["young"]
        assert one.kv.cache.match((9,)) == []  # the older one had it before the younger went

    def test_traces_may_hash_longer_pieces(self) -> None:
        """Public traces hash 16 or 512 tokens at a time, whatever the engine's block."""
        one = batch(caching=True)
        one.add("a", prompt_tokens=12, output_tokens=1, hashes=(1, 2, 3), hash_tokens=6)
        step(one)
        one.add("b", prompt_tokens=12, output_tokens=1, hashes=(1, 5), hash_tokens=6)
        step(one)
        assert one.hit_tokens_total == 4  # of six tokens one whole block
        with pytest.raises(ConfigInvalid, match="hash_tokens"):
            one.add("c", prompt_tokens=9, output_tokens=1, hashes=(1,), hash_tokens=3)

    def test_switched_off_it_finds_nothing(self) -> None:
        """Otherwise a policy without prefix caching could not be compared with one that has it."""
        one = batch()
        for key in "ab":
            one.add(key, prompt_tokens=8, output_tokens=1, hashes=(1, 2))
            step(one)
        assert (one.hit_tokens_total, one.prefill_tokens_total) == (0, 16)


def test_ends_that_never_come_take_no_memory() -> None:
    """Answers that an end token ends early would each leave a place in the heap of ends."""
    one = batch(kv_blocks=30_000)
    one.add("long", prompt_tokens=1, output_tokens=100_000)
    for n in range(2000):
        sequence = one.add(str(n), prompt_tokens=1, output_tokens=100_000)
        step(one)
        one.finish(sequence)
    assert len(one.ends) < 200
