"""The best dispatch of given replicas: types apart where that pays, together where it does not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from services.scheduler.policies.capacity import Column, build
from services.scheduler.policies.dispatching import Tried, best_dispatch, busiest_part, ranked
from services.scheduler.policies.history import Pattern
from services.scheduler.policies.joint_judge import Judge
from services.scheduler.policies.rehearsal import Drawn, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from services.scheduler.policies.rehearsal_outcome import Fared, Spread
from services.scheduler.policies.separation import LONG
from shared.hardware import Parallelism
from tests.unit.joint_cases import MadeUpRates, offers, problem

MODEL = "llama-2-70b"
CHAT, CODE = (6.0, 300.0, 200.0), (3.0, 5000.0, 20.0)


def a_judge() -> Judge:
    asked = problem({MODEL: (CHAT, CODE)}, offers(16))
    source = MadeUpRates()
    return Judge(problem=asked, table=build(asked, source), source=source, horizon_s=300.0)


def four_tp4(judge: Judge) -> Counter[Column]:
    (pool,) = judge.table.pools
    return Counter({Column(MODEL, pool, Parallelism(4, 1)): 4})


def drawn_with(judge: Judge, *code_rps: float) -> Drawn:
    """Half minutes of steady chat, with code at these rates."""
    rates = np.array([[CHAT[0], rps] for rps in code_rps])
    pattern = Pattern(seconds=np.full(len(code_rps), 30.0), rates=rates)
    return requests(judge.table, seconds=pattern.length_s, seed=3, pattern=pattern)


def test_bursts_of_long_prompts_get_replicas_of_their_own() -> None:
    """Chat would wait for all of every burst."""
    judge = a_judge()
    drawn = drawn_with(judge, 1.0, 1.0, 30.0, 1.0, 1.0, 1.0, 30.0, 1.0)
    found = best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn)
    assert "prompts over " in found.dispatch.words
    assert any(column.group == LONG for column in found.dispatch.counts)


def test_short_prompts_stay_together() -> None:
    """Fewer replicas for each is more waiting for all, with nothing to gain."""
    asked = problem({MODEL: ((3.0, 100.0, 200.0), (3.0, 300.0, 200.0))}, offers(16))
    source = MadeUpRates()
    judge = Judge(problem=asked, table=build(asked, source), source=source, horizon_s=300.0)
    drawn = requests(judge.table, seconds=120.0, seed=3)
    found = best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn)
    assert found.dispatch.words == ""
    assert found.outcome.whole.goodput_share == pytest.approx(1.0)


def test_same_question_same_answer() -> None:
    """Weights would change from one decision to the next for nothing."""
    judge = a_judge()
    drawn = drawn_with(judge, 1.0, 20.0, 1.0)
    one, two = (best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn) for _ in range(2))
    assert one.dispatch.words == two.dispatch.words
    assert np.array_equal(one.dispatch.shares, two.dispatch.shares)


def test_neither_goodput_nor_tail_is_bought_with_all_of_the_other() -> None:
    """One type would wait forever so that a few more requests of another come in time."""
    judge = a_judge()
    base = best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn_with(judge, 0.5))

    def tried(goodput: float, p99_s: float) -> Tried:
        whole = Fared(
            requests=9, ttft_s=Spread(), tpot_s=Spread(), e2e_s=Spread(p99=p99_s),
            goodput_share=goodput,
        )  # fmt: skip
        return replace(base, outcome=replace(base.outcome, whole=whole))

    even, greedy, better = tried(0.50, 60.0), tried(0.57, 300.0), tried(0.60, 62.0)
    assert ranked([even, greedy, better]) == [better, even, greedy]
    assert ranked([even, tried(0.505, 60.0)])[0] is even, "a tie goes to what is listed first"


def test_the_busiest_part_is_the_one_with_most_tokens() -> None:
    """Dispatches would be compared on a calm stretch, in which they do not differ."""
    judge = a_judge()
    drawn = drawn_with(judge, 1.0, 1.0, 30.0, 1.0)
    part = busiest_part(drawn, 600)
    assert len(part) == 600
    assert (part.kinds == 1).mean() > 0.7
    assert part.at_s[0] == 0.0
    assert part.seconds == pytest.approx(float(part.at_s[-1]))
    assert busiest_part(drawn, len(drawn)) is drawn
