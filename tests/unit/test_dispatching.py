"""The best dispatch of given replicas: types apart where that pays, together where it does not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from services.scheduler.policies.capacity import Column, build
from services.scheduler.policies.dispatching import (
    GAIN_MIN,
    Tried,
    best_dispatch,
    busiest_part,
    ranked,
)
from services.scheduler.policies.history import Pattern
from services.scheduler.policies.joint_judge import Judge
from services.scheduler.policies.rehearsal import Drawn, Rehearsed, Scene, rehearse, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from services.scheduler.policies.rehearsal_outcome import Fared, Spread
from services.scheduler.policies.separation import LONG, Dispatch, apart, together
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


BURSTS = (1.0, 1.0, 30.0, 1.0, 1.0, 1.0, 30.0, 1.0)


def test_bursts_of_long_prompts_get_replicas_of_their_own() -> None:
    """Chat would wait for all of every burst."""
    judge = a_judge()
    drawn = [drawn_with(judge, *BURSTS)]
    found = best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn)
    assert "prompts over " in found.words
    assert any(column.group == LONG for column in found.counts)


def test_short_prompts_stay_together() -> None:
    """Fewer replicas for each is more waiting for all, with nothing to gain."""
    judge, drawn = alike()
    scene = scene_of(judge)
    found = best_dispatch(judge, scene, four_tp4(judge), [drawn])
    assert found.words == ""
    assert played(scene, found, drawn).outcomes[0].whole.goodput_share == pytest.approx(1.0)


def played(scene: Scene, dispatch: Dispatch, drawn: Drawn) -> Tried:
    own = replace(scene, table=dispatch.table)
    outcome = rehearse(own, dispatch.counts, dispatch.shares, drawn)
    return Tried(dispatch=dispatch, outcomes=(outcome,))


def alike() -> tuple[Judge, Drawn]:
    """Two types of short prompts, in calm."""
    asked = problem({MODEL: ((3.0, 100.0, 200.0), (3.0, 300.0, 200.0))}, offers(16))
    source = MadeUpRates()
    judge = Judge(problem=asked, table=build(asked, source), source=source, horizon_s=300.0)
    return judge, requests(judge.table, seconds=120.0, seed=3)


def test_same_question_same_answer() -> None:
    """Weights would change from one decision to the next for nothing."""
    judge = a_judge()
    drawn = [drawn_with(judge, 1.0, 20.0, 1.0)]
    one, two = (best_dispatch(judge, scene_of(judge), four_tp4(judge), drawn) for _ in range(2))
    assert one.words == two.words
    assert np.array_equal(one.shares, two.shares)


def test_what_stands_is_left_for_what_is_clearly_better_only() -> None:
    """Weights would flap between dispatches that differ by the luck of the last minutes."""
    judge, calm = alike()
    scene, counts = scene_of(judge), four_tp4(judge)
    as_is = together(judge.table, counts)
    assert best_dispatch(judge, scene, counts, [calm], standing=as_is) is as_is
    apart_ = next(iter(apart(as_is, MODEL))).strict
    worse, better = (played(scene, each, calm).worth for each in (apart_, as_is))
    assert worse < better < worse * (1.0 + GAIN_MIN)
    assert best_dispatch(judge, scene, counts, [calm], standing=apart_) is apart_
    judge = a_judge()
    bursts = [drawn_with(judge, *BURSTS)]
    mixed = together(judge.table, counts)
    left = best_dispatch(judge, scene_of(judge), counts, bursts, standing=mixed)
    assert left is not mixed
    assert "prompts over " in left.words
    assert best_dispatch(judge, scene_of(judge), counts, bursts, standing=left) is left


def test_neither_goodput_nor_tail_is_bought_with_all_of_the_other() -> None:
    """One type would wait forever so that a few more requests of another come in time."""
    even, greedy, better = tried((0.50, 60.0)), tried((0.57, 300.0)), tried((0.60, 62.0))
    assert ranked([even, greedy, better]) == [better, even, greedy]
    assert ranked([even, tried((0.505, 60.0))])[0] is even, "a tie goes to what is listed first"


def test_what_stands_gives_way_to_what_is_better_and_no_worse_beyond() -> None:
    """A dispatch that is better at what is foreseen may founder beyond it."""
    now = tried((0.5, 10.0), (0.4, 100.0))
    assert tried((0.9, 10.0), (0.4, 100.0)).beats(now)
    assert not tried((0.9, 10.0), (0.39, 100.0)).beats(now)
    assert not tried((0.5, 10.0 / (1.0 + GAIN_MIN)), (0.9, 10.0)).beats(now), "hardly better"
    assert not now.beats(now)


def tried(*levels: tuple[float, float]) -> Tried:
    """A dispatch with this goodput and P99 of E2E at each level."""
    judge = a_judge()
    base = together(judge.table, four_tp4(judge))
    wholes = [
        Fared(
            requests=9, ttft_s=Spread(), tpot_s=Spread(), e2e_s=Spread(p99=p99_s),
            goodput_share=goodput,
        )
        for goodput, p99_s in levels
    ]  # fmt: skip
    outcomes = [Rehearsed(types=(), columns={}, whole=whole, requests=9) for whole in wholes]
    return Tried(dispatch=base, outcomes=tuple(outcomes))


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
