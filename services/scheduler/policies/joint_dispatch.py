"""Who goes where, once it is decided which replicas there are: the last part of a decision.

Types are sent to the replicas of the plan together or apart, as it turns out best with the last
minutes' arrivals (``dispatching``). What is found is kept for ``REVIEW_S`` as long as the replicas
stay and demand is near that for which it was found, and after that unless another is clearly
better.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.dispatching import best_dispatch
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.horizon_lasting import Demand, near
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.rehearsal_choice import past_of, scene_of
from services.scheduler.policies.separation import Dispatch, as_weighted, deal, ungrouped, widened

REVIEW_S = 120.0


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
    demand: Demand
    words: str

    def holds(self, now_s: float, demand: Demand, horizon_s: float) -> bool:
        recent = 0.0 <= now_s - self.at_s < REVIEW_S
        return recent and near(self.demand, demand, horizon_s=horizon_s)


class Dispatcher:
    """Remembers for which replicas and which demand it looked last, and what it found in words."""

    def __init__(self) -> None:
        self._found: _Found | None = None

    def sent(
        self,
        judge: Weighed,
        candidate: Candidate,
        placed: Placed,
        *,
        demand: Demand,
        horizon_s: float,
    ) -> Sent:
        """``candidate`` on ``placed`` replicas, with the dispatch to use."""
        problem, counts = judge.problem, ungrouped(placed.counts)
        rows, replicas = problem.in_force.weights, frozenset(placed.columns)
        standing: Dispatch | None = None
        own: Mapping[str, Column] = {}
        if rows and replicas == frozenset(s.replica_id for s in problem.in_force.replicas):
            standing, own = as_weighted(judge.usual.table, placed.columns, rows)
        last = self._found
        known = standing is not None and last is not None and last.replicas == replicas
        words = last.words if known and last is not None else ""
        best = standing
        if not (known and last is not None and last.holds(problem.now_s, demand, horizon_s)):
            drawn = past_of(judge.usual, horizon_s=horizon_s)[:1]
            best = best_dispatch(
                judge.usual, scene_of(judge.usual), counts, drawn, standing=standing
            )
            words = words if best is standing else best.words
            self._found = _Found(replicas=replicas, at_s=problem.now_s, demand=demand, words=words)
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
