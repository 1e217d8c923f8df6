"""Who goes where, once it is decided which replicas there are: the last part of a decision.

Types are sent to the replicas of the plan together or apart, as it turns out best with the last
minutes' arrivals (``dispatching``), as they came: bursts come and go faster than forecasts of them,
and replicas that change hands in the middle of one are late for both sides. What is found is kept
for ``REVIEW_S`` as long as the replicas stay, and after that unless another is clearly better.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.capacity_types import ARRIVALS_MIN
from services.scheduler.policies.dispatching import best_dispatch
from services.scheduler.policies.history import pattern_of
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint_judge import Candidate, Judge
from services.scheduler.policies.rehearsal import Drawn, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from services.scheduler.policies.separation import Dispatch, as_weighted, deal, ungrouped, widened

REVIEW_S = 120.0
REQUESTS_MAX = 8000.0  # of the past that is played again: some 0.2 s for each dispatch
SEED = 1


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
    at_s: float
    words: str


class Dispatcher:
    """Remembers for which replicas and which demand it looked last, and what it found in words."""

    def __init__(self) -> None:
        self._found: _Found | None = None

    def sent(
        self, judge: Weighed, candidate: Candidate, placed: Placed, *, horizon_s: float
    ) -> Sent:
        """``candidate`` on ``placed`` replicas, with the dispatch to use."""
        problem, replicas = judge.problem, frozenset(placed.columns)
        rows = problem.in_force.weights
        past, drawn = _played(judge.usual, horizon_s)
        standing: Dispatch | None = None
        own: Mapping[str, Column] = {}
        if rows and replicas == frozenset(s.replica_id for s in problem.in_force.replicas):
            standing, own = as_weighted(past.table, placed.columns, rows)
        last, words, best = self._found, "", standing
        if standing is not None and last is not None and last.replicas == replicas:
            words = last.words
            due = not 0.0 <= problem.now_s - last.at_s < REVIEW_S
        else:
            due = True
        if due:
            best = best_dispatch(
                past, scene_of(past), ungrouped(placed.counts), [drawn], standing=standing
            )
            words = words if best is standing else best.words
            self._found = _Found(replicas=replicas, at_s=problem.now_s, words=words)
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


def _played(usual: Judge, horizon_s: float) -> tuple[Judge, Drawn]:
    """The judge of what arrived in the last minutes, and these arrivals."""
    table = usual.table
    pattern = pattern_of(table.types, usual.problem.history, horizon_s=horizon_s, follow=False)
    pattern = pattern.newest(REQUESTS_MAX)
    types = tuple(
        replace(kind, arrivals_rps=max(ARRIVALS_MIN, float(mean)))
        for kind, mean in zip(table.types, pattern.means, strict=True)
    )
    past = replace(usual, table=replace(table, types=types))
    return past, requests(past.table, seconds=pattern.length_s, seed=SEED, pattern=pattern)
