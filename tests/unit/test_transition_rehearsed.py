"""Plans played through before a move: what is compared is what was seen, of the same requests."""

from collections import Counter
from dataclasses import replace

import pytest

from services.scheduler.policies.capacity import build
from services.scheduler.policies.horizon import Foresight
from services.scheduler.policies.horizon_judge import Weighed, weighed
from services.scheduler.policies.joint_choice import Candidate, candidates, solve_capacity
from services.scheduler.policies.rehearsal import Rehearsed
from services.scheduler.policies.rehearsal_outcome import Fared, Spread
from services.scheduler.policies.transition_columns import columns_of
from services.scheduler.policies.transition_options import OTHERS_MAX, options
from services.scheduler.policies.transition_rehearsed import SCALE_MAX, Tried, late, tried
from services.scheduler.policies.transition_rules import GAIN_MIN
from tests.unit.joint_cases import MadeUpRates, offers, problem
from tests.unit.test_transition import FOUR, M, replicas


def case(scale: float) -> Weighed:
    asked = problem({M: [(scale * rps, i, o) for rps, i, o in FOUR]}, offers(16))
    foreseen = Foresight().foresee(asked)
    table = build(foreseen.high, MadeUpRates())
    return weighed(foreseen, table, MadeUpRates(), horizon_s=300.0)


def standing(judge: Weighed, shape: str, count: int) -> Candidate:
    each = 16 // count
    specs = replicas(shape, range(0, 16, each))
    return judge.dispatched(Counter(columns_of(judge.table, specs).values()))


def played(judge: Weighed, kept: Candidate, *, elastic: bool = False) -> Tried:
    best, terms = solve_capacity(judge.table, [M], time_limit_s=10.0)
    assert best is not None
    found = candidates(judge, best, terms, time_limit_s=10.0)
    return tried(judge, found, kept, found[0], horizon_s=60.0, elastic=elastic)


def test_others_are_as_late_as_they_are_worth_less_than_what_stands() -> None:
    """A plan with few in time and a short tail would look like a gain."""
    judge = case(2.0)
    kept = standing(judge, "tp4", 4)
    found = played(judge, kept)
    own = found.ranking.of(kept)
    assert own is not None
    assert found.kept.lateness == late(judge.usual.table, own.outcome)
    assert found.kept.counts == kept.counts
    assert [plan.counts for plan in found.plans] == [
        each.candidate.counts for each in found.ranking.played
    ]
    assert found.choice is found.plans[0]
    assert len(found.plans) > 2
    for plan, each in zip(found.plans, found.ranking.played, strict=True):
        assert plan.lateness * each.worth == pytest.approx(found.kept.lateness * own.worth)
        assert len(each.outcomes) == 2, "at the level expected, and beyond"


def test_where_gpus_may_be_left_unused_only_being_late_counts() -> None:
    """A cheaper plan that is in time would look like a loss."""
    judge = case(0.5)
    found = played(judge, standing(judge, "tp4", 4), elastic=True)
    for plan, each in zip(found.plans, found.ranking.played, strict=True):
        assert plan.lateness == late(judge.usual.table, each.outcome)


def test_formulas_are_scaled_by_how_far_they_were_off_within_reason() -> None:
    """Replicas that serve while others start would be compared by another measure."""
    judge = case(2.0)
    kept = standing(judge, "tp4", 4)
    found = played(judge, kept)
    assert found.scale == pytest.approx(found.kept.lateness / kept.lateness)
    for factor, scale in ((1e-6, SCALE_MAX), (1e6, 1.0 / SCALE_MAX)):
        absurd = replace(kept, lateness=kept.lateness * factor)
        assert played(judge, absurd).scale == pytest.approx(scale)
    assert played(judge, replace(kept, lateness=0.0)).scale == 1.0


def test_lateness_is_of_the_times_that_were_seen() -> None:
    """The worse of both times against its target, by type, weighted by arrivals; of a type that
    nothing came of there is nothing to say."""
    judge = case(1.0)
    table = judge.usual.table
    target = table.types[0].target

    def fared(ttft: float | None, tpot: float | None) -> Fared:
        return Fared(
            requests=1, goodput_share=1.0, e2e_s=Spread(),
            ttft_s=Spread(p99=None if ttft is None else ttft * target.ttft_s),
            tpot_s=Spread(p99=None if tpot is None else tpot * target.tpot_s),
        )  # fmt: skip

    def seen(*types: Fared) -> Rehearsed:
        return Rehearsed(types=types, columns={}, whole=types[0], requests=9)

    outcome = seen(fared(2.0, 0.5), fared(0.5, 3.0), fared(None, None), fared(4.0, None))
    rates = [kind.arrivals_rps for kind in table.types]
    expected = (rates[0] * 2.0 + rates[1] * 3.0 + rates[3] * 4.0) / (rates[0] + rates[1] + rates[3])
    assert late(table, outcome) == pytest.approx(expected)
    assert late(table, seen(*[fared(None, None)] * 4)) == 0.0


def test_plans_that_are_tried_are_the_best_and_those_worth_going_to() -> None:
    """A way to a plan that gains nothing would be looked for, or none to the second best."""
    judge = case(2.0)
    found = played(judge, standing(judge, "tp4", 4))
    best, *_ = found.plans

    def with_lateness(*values: float) -> Tried:
        plans = tuple(replace(best, lateness=value) for value in values)
        return replace(found, kept=replace(found.kept, lateness=1.0), plans=plans)

    just = 1.0 - GAIN_MIN
    some = with_lateness(0.95, just - 0.01, just + 0.01, 0.5, 0.6, 0.7)
    assert options(some) == [some.plans[i] for i in (0, 1, 3, 4)]
    assert len(options(some)) == 1 + OTHERS_MAX
    lone = with_lateness(2.0)
    assert options(lone) == list(lone.plans)
