"""Who goes where, once it is decided which replicas there are: the last part of a decision.

Types are sent to the replicas of the plan together or apart, as it turns out best with the last
minutes' arrivals (``dispatching``), as they came: bursts come and go faster than forecasts of them,
and replicas that change hands in the middle of one are late for both sides. What is found is kept
for ``REVIEW_S`` as long as the replicas stay, and after that unless another is clearly better.

Types are kept apart only with a past of ``PAST_S_MIN`` to go by, if requests have really waited in
the last ``WAITED_S``, if the replicas carry the past's mean with ``ROOM``, so that it is bursts
that made them wait, and if it is no worse at ``STRESS`` times the past's level: the part that was
given too few replicas has nobody to turn to. When it comes to that all the same, and replicas drown
beside idle ones of their model, types go together again at once, for ``TOGETHER_S`` at least.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.capacity_types import ARRIVALS_MIN
from services.scheduler.policies.dispatching import best_dispatch
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.history import pattern_of
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.interface import Problem
from services.scheduler.policies.joint_judge import Candidate, Judge
from services.scheduler.policies.rehearsal import Drawn, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from services.scheduler.policies.separation import (
    Dispatch,
    as_weighted,
    deal,
    together,
    ungrouped,
    widened,
)

REVIEW_S = 120.0
REQUESTS_MAX = 6000.0  # of the past that is played again: some 0.1 s for each dispatch
SEED = 1
PAST_S_MIN = 240.0
STRESS = 1.4
ROOM = 1.2  # times the past's mean
TOGETHER_S = 300.0
DROWNED, DROWNED_MIN = 2.0, 32  # times as many wait as run, and so many
WAITED, WAITED_S = 16, 600.0  # so many at one replica, and how long ago at most
IDLE = 4  # requests that wait: next to none


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A plan with its dispatch: judge, candidate and placed replicas with groups as columns.
    ``stays``: it is that of the plan in force, whose replicas these are."""

    judge: Weighed
    candidate: Candidate
    placed: Placed
    words: str
    stays: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    replicas: frozenset[str]
    until_s: float
    words: str


DROWNING = "together again: requests piled up at replicas beside idle ones"


class Dispatcher:
    """Remembers for which replicas and which demand it looked last, and what it found in words."""

    def __init__(self) -> None:
        self._found: _Found | None = None
        self._waited_s = float("-inf")  # when requests were last seen to wait

    def sent(
        self, judge: Weighed, candidate: Candidate, placed: Placed, *, horizon_s: float
    ) -> Sent:
        """``candidate`` on ``placed`` replicas, with the dispatch to use."""
        problem, replicas = judge.problem, frozenset(placed.columns)
        counts, rows = ungrouped(placed.counts), problem.in_force.weights
        if any(report.waiting >= WAITED for report in problem.loads):
            self._waited_s = problem.now_s
        past, drawn = _played(judge.usual, horizon_s)
        standing: Dispatch | None = None
        own: Mapping[str, Column] = {}
        if rows and replicas == frozenset(s.replica_id for s in problem.in_force.replicas):
            standing, own = as_weighted(past.table, placed.columns, rows)
        last, words, best = self._found, "", standing
        due = standing is None or last is None or last.replicas != replicas
        if standing is not None and last is not None and last.replicas == replicas:
            words = last.words
            due = not 0.0 <= last.until_s - problem.now_s <= TOGETHER_S
        for_s = REVIEW_S
        separated = standing is not None and len(standing.counts) > len(counts)
        if separated and drowning(problem):
            best, words, for_s = together(past.table, counts), DROWNING, TOGETHER_S
        elif due:
            waited = problem.now_s - self._waited_s <= WAITED_S
            separate = waited and _long_enough(problem) and _carried(past, counts) >= ROOM
            best = best_dispatch(
                past, scene_of(past), counts, drawn, standing=standing, separate=separate
            )
            words = words if best is standing and words != DROWNING else best.words
        if due or best is not standing:
            until_s = problem.now_s + for_s
            self._found = _Found(replicas=replicas, until_s=until_s, words=words)
        assert best is not None, "it is looked for, or stands"
        stays = best is standing
        columns = best.table.columns
        usual = replace(judge.usual, table=widened(judge.usual.table, columns))
        return Sent(
            judge=replace(judge, table=widened(judge.table, columns), usual=usual),
            candidate=replace(candidate, counts=best.counts, shares=best.shares),
            placed=replace(placed, columns=own) if stays else deal(placed, best.counts),
            words=words,
            stays=stays,
        )


def drowning(problem: Problem) -> bool:
    """Whether requests pile up at some replica while others of its model have next to none."""
    models = {spec.replica_id: spec.model_id for spec in problem.in_force.replicas}
    drown: set[str] = set()
    idle: set[str] = set()
    for report in problem.loads:
        model_id = models.get(report.replica_id, "")
        if report.waiting >= max(DROWNED_MIN, DROWNED * report.running):
            drown.add(model_id)
        elif report.waiting <= IDLE:
            idle.add(model_id)
    return bool(drown & idle)


def _carried(past: Judge, counts: Mapping[Column, int]) -> float:
    """Times the past's mean demand that ``counts`` can carry."""
    flow = best_flow(past.table.instance(counts), "headroom")
    return flow.headroom if flow else 0.0


def _long_enough(problem: Problem) -> bool:
    """Whether the past tells of bursts."""
    longest = max(
        (sum(window.seconds for window in past) for past in problem.history.values()), default=0.0
    )
    return longest >= PAST_S_MIN


def _played(usual: Judge, horizon_s: float) -> tuple[Judge, list[Drawn]]:
    """The judge of what arrived in the last minutes, and these arrivals, at their level and at
    ``STRESS`` times that."""
    table = usual.table
    pattern = pattern_of(table.types, usual.problem.history, horizon_s=horizon_s, follow=False)
    pattern = pattern.newest(REQUESTS_MAX)
    types = tuple(
        replace(kind, arrivals_rps=max(ARRIVALS_MIN, float(mean)))
        for kind, mean in zip(table.types, pattern.means, strict=True)
    )
    past = replace(usual, table=replace(table, types=types))
    seconds = pattern.length_s
    levels = [pattern, replace(pattern, rates=STRESS * pattern.rates)]
    return past, [requests(past.table, seconds=seconds, seed=SEED, pattern=p) for p in levels]
