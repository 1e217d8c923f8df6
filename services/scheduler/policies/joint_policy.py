"""Policy "oserve": the exact joint plan, ranked by predicted tails, and moved to only if that pays.

Each period: solve for counts and shares together (``joint``), choose among near-optimal plans by
lateness (``joint_choice``, ``joint_refine``), and compare the choice with the replicas in force
under the best shares for what is expected now. New shares cost nothing and are taken when they
differ. Other replicas cost a switch: while it lasts, only the replicas that stay serve. With
``late`` as lateness, the replicas change if all of these hold:

    late(in force) - late(choice) > GAIN_MIN * late(in force)
    (late(in force) - late(choice)) * (payback_s - switch_s)
        > (late(staying alone) - late(in force)) * switch_s
    backlog(switch) <= backlog(in force)

The second is a payback test as in HexGen-3's scheduler, in lateness instead of throughput. The
third is a fluid's: demand that finds no capacity waits, a switch builds a queue that the new plan
must work off beside what goes on arriving, and the sum of that waiting may not exceed what the
replicas in force would let build up. The switch takes as long as running requests are given to end,
and the slowest new replica needs to start, unless ``switch_s`` is given.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.scheduler.policies.capacity import Column, Table, build, standing
from services.scheduler.policies.capacity_plan import Placed, brief, place_counts, weights
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.joint import Solution
from services.scheduler.policies.joint_choice import (
    Candidate,
    Judge,
    LatencySource,
    candidates,
    choose,
    solve_capacity,
)
from services.scheduler.policies.joint_refine import refine
from services.scheduler.policies.weights import planned

PERIOD_S = 30.0
PAYBACK_S = 300.0  # what a plan is expected to last: HexGen-3's stability window
GAIN_MIN = 0.1  # of lateness: well within the error of its prediction
OUTLOOK = 6.0  # backlogs are foreseen for so many times a switch's length, or for PAYBACK_S
DRAIN_S = 30.0  # what a switch lets running requests go on for: switcher.drain_timeout_s
SHARE_MIN = 0.02  # weights that differ less stay
CAUTION = 1.25  # times a forecast's mean absolute error: one standard deviation, were it normal
PROGRAMS = 16  # solved for one decision at most, each in its part of the time limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    moves: bool
    why: str


class OServe:
    """Registered as "oserve"."""

    period_s = PERIOD_S
    slow = True

    def __init__(
        self,
        source: LatencySource | None = None,
        *,
        payback_s: float = PAYBACK_S,
        switch_s: float | None = None,
    ) -> None:
        """``switch_s``: how long a switch takes; None: as long as new replicas take to start."""
        self._source = source or CostRates()
        self._payback_s, self._switch_s = payback_s, switch_s

    def plan(self, problem: Problem) -> Planned:
        every = build(problem, self._source, caution=CAUTION)
        table = every.only(every.servable())
        if not table.columns or not table.types:
            return Planned(plan=None, reason=every.shortcomings() or "no GPU is on offer")
        limit_s = problem.time_limit_s / PROGRAMS
        models = [model.model_id for model in problem.models]
        best, wanted = solve_capacity(table, models, time_limit_s=limit_s)
        if best is None or not best.counts:
            return Planned(plan=None, reason=f"no plan was found within {limit_s:g} s")
        judge = Judge(problem=problem, table=table, source=self._source, horizon_s=self._payback_s)
        found = candidates(judge, best, wanted, time_limit_s=limit_s)
        choice = refine(judge, choose(found))
        placed = place_counts(table, choice.counts, problem.in_force)
        if placed.dropped and placed.counts:
            choice = judge.dispatched(placed.counts)
        notes = [
            _capacity(best, len(found)),
            _left_out(best, models),
            every.shortcomings(),
            placed.reason,
        ]
        standing_ = self._standing(problem, table)
        if not standing_:
            return self._answer(judge, choice, placed, [_about("the plan", choice), *notes])
        kept = judge.dispatched(standing_)
        verdict = self._verdict(judge, kept, choice, placed)
        notes = [verdict.why, *notes]
        if verdict.moves:
            return self._answer(judge, choice, placed, notes)
        return self._reweighted(judge, kept, notes)

    def _standing(self, problem: Problem, table: Table) -> Counter[Column]:
        known = standing(problem.in_force, table.pools)
        return Counter(
            {column: count for column, count in known.items() if column in table.columns}
        )

    def _verdict(self, judge: Judge, kept: Candidate, choice: Candidate, placed: Placed) -> Verdict:
        """Whether to change replicas. Those that lost a GPU are gone already, and cost nothing."""
        if Counter(choice.counts) == Counter(kept.counts):
            return Verdict(moves=False, why=_about("the replicas in force are the best", kept))
        gain = kept.lateness - choice.lateness
        compared = f"{_about('in force', kept)}; {_about('best', choice)}"
        if gain <= GAIN_MIN * kept.lateness:
            return Verdict(moves=False, why=f"{compared}: a gain below {GAIN_MIN:.0%} is no reason")
        switch_s = self._switch_time_s(judge, kept, placed)
        in_force = judge.problem.in_force
        stays = {spec.replica_id for spec in in_force.replicas} & placed.columns.keys()
        staying = Counter(placed.columns[replica_id] for replica_id in stays)
        during = replace(judge, horizon_s=max(1.0, switch_s))
        strain = max(0.0, _late(during, staying) - kept.lateness)
        benefit, cost = gain * max(0.0, self._payback_s - switch_s), strain * switch_s
        sums = (
            f"{gain:.3g} less for {max(0.0, self._payback_s - switch_s):.0f} s against "
            f"{strain:.3g} more while switching for {switch_s:.1f} s"
        )
        if benefit <= cost:
            return Verdict(moves=False, why=f"{compared}: does not pay back, {sums}")
        left = during.dispatched(staying).headroom if staying else 0.0
        ahead_s = max(self._payback_s, OUTLOOK * switch_s)
        moved = backlog([(switch_s, left), (ahead_s - switch_s, choice.headroom)])
        stood = backlog([(ahead_s, kept.headroom)])
        if moved > stood:
            queue_s = max(0.0, 1.0 - left) * switch_s
            return Verdict(
                moves=False,
                why=f"{compared}: while switching for {switch_s:.1f} s {left:.3g} times the demand "
                f"is served, which leaves {queue_s:.0f} s of demand to work off",
            )
        return Verdict(moves=True, why=f"{compared}: pays back, {sums}")

    def _switch_time_s(self, judge: Judge, kept: Candidate, placed: Placed) -> float:
        new = placed.counts - Counter(kept.counts)
        if not new:
            return 0.0
        if self._switch_s is not None:
            return self._switch_s
        return DRAIN_S + max(judge.start_s(column) for column in new)

    def _reweighted(self, judge: Judge, kept: Candidate, notes: list[str]) -> Planned:
        in_force = judge.problem.in_force
        placed = place_counts(judge.table, kept.counts, in_force)
        rows = weights(judge.table, placed, kept.shares)
        lost = len(in_force.replicas) - len(placed.replicas)
        change = _largest_change(in_force.weights, rows)
        if not lost and change < SHARE_MIN:
            return Planned(plan=in_force, reason=_joined([*notes, "its weights still fit"]))
        what = f"{lost} replicas lost" if lost else f"weights change by up to {change:.2f}"
        return self._answer(judge, kept, placed, [*notes, what])

    def _answer(self, judge: Judge, choice: Candidate, placed: Placed, notes: list[str]) -> Planned:
        rows = weights(judge.table, placed, choice.shares)
        return planned(placed.replicas, rows, reason=_joined(notes), dropped=placed.dropped)


def backlog(phases: Sequence[tuple[float, float]]) -> float:
    """The waiting that builds up, in seconds of demand times seconds, over phases of (seconds,
    times the demand that is served): the area under the queue, which is never below zero."""
    queue = area = 0.0
    for seconds, headroom in phases:
        lasts, growth = max(0.0, seconds), 1.0 - headroom
        if growth < 0.0:
            lasts = min(lasts, queue / -growth)  # worked off, and empty from then on
        area += lasts * (queue + growth * lasts / 2.0)
        queue = max(0.0, queue + growth * lasts)
    return area


def _capacity(best: Solution, compared: int) -> str:
    what = "times the demand" if best.goal == "headroom" else "requests/s"
    proof = "proven best" if best.optimal else f"bound {best.bound:.3g}, time was up"
    return (
        f"at most {best.objective:.3g} {what} could be served ({proof}); {compared} plans compared"
    )


def _left_out(best: Solution, models: list[str]) -> str:
    """What the GPUs do not suffice for; empty when they suffice."""
    with_replica = {column.model_id for column in best.counts}
    without = [model_id for model_id in models if model_id not in with_replica]
    if without:
        return f"no GPUs for {', '.join(without)}"
    return "" if best.goal == "headroom" else "GPUs do not suffice to serve some of every type"


def _late(judge: Judge, counts: Counter[Column]) -> float:
    if counts:
        return judge.dispatched(counts).lateness
    return judge.lateness({}, np.zeros_like(judge.table.rates))


def _about(what: str, candidate: Candidate) -> str:
    return (
        f"{what} ({brief(candidate.counts)}) serves {candidate.headroom:.3g} times the demand, "
        f"slowest 1 % at {candidate.lateness:.3g} of target"
    )


def _largest_change(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> float:
    """Of any share in ``after``; a row that is new counts against the row for "*"."""
    largest = 0.0
    for name, row in after.items():
        old = before.get(name, before.get("*", {}))
        for replica_id in row.keys() | old.keys():
            largest = max(largest, abs(row.get(replica_id, 0.0) - old.get(replica_id, 0.0)))
    return largest


def _joined(notes: list[str]) -> str:
    return "; ".join(note for note in notes if note)
