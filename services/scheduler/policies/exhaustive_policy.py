"""Policy "exhaustive": in each period the deployment of greatest headroom, by looking at them all.

The comparator for plan quality where clusters are small: rates like those of "oserve", the lower
level of "oserve-paper", and nothing left out (``exhaustive``). It goes by fluid capacity alone,
without tails or the cost of a switch, and moves whenever the best deployment differs. Of what
operators ask for beyond the targets it minds ``replicas_min`` only.
"""

from dataclasses import replace

from services.scheduler.policies.capacity import RateSource, build
from services.scheduler.policies.capacity_plan import brief, even_shares, place_counts, weights
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.exhaustive import FLOWS_MAX, LISTED_MAX, Exhausted, exhaust
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.minimums import left_out, minimums
from services.scheduler.policies.weights import planned
from shared.messages.decisions import Decision

PERIOD_S = 60.0


class Exhaustive:
    """Registered as "exhaustive"."""

    period_s = PERIOD_S
    slow = True

    def __init__(
        self,
        source: RateSource | None = None,
        *,
        listed_max: int = LISTED_MAX,
        flows_max: int = FLOWS_MAX,
    ) -> None:
        self._source = source or CostRates()
        self._listed_max, self._flows_max = listed_max, flows_max

    def plan(self, problem: Problem) -> Planned:
        every = build(problem, self._source)
        table = every.only(every.servable())
        if not table.columns or not table.types:
            return Planned(plan=None, reason=every.shortcomings() or "no GPU is on offer")
        attempts = (
            exhaust(table, least, listed_max=self._listed_max, flows_max=self._flows_max)
            for least in minimums(problem, table)
        )
        found = next((attempt for attempt in attempts if attempt is not None), None)
        if found is None or not found.counts:
            return Planned(plan=None, reason="not one replica finds room on the GPUs on offer")
        placed = place_counts(table, found.counts, problem.in_force)
        models = {column.model_id for column in placed.counts}
        notes = [
            f"{brief(found.counts)} serves {_carries(found, float(table.demand.sum()))}",
            _looked_at(found),
            left_out(problem, models),
            every.shortcomings(),
            placed.reason,
        ]
        answer = planned(
            placed.replicas,
            weights(table, placed, even_shares(table, placed.counts)),
            reason="; ".join(note for note in notes if note),
            dropped=placed.dropped,
        )
        return replace(answer, decision=_decision(found))


def _carries(found: Exhausted, total: float) -> str:
    if found.goal == "headroom":
        return f"{found.objective:.3g} times the demand"
    return f"{found.objective:.3g} of {total:.3g} requests/s, and not some of every type"


def _looked_at(found: Exhausted) -> str:
    if found.exact:
        return f"the best of all {found.total} deployments, {found.flows} flows solved"
    return (
        f"the best found in {found.listed} of {found.total} deployments, {found.flows} flows "
        "solved: too many to look at all"
    )


def _decision(found: Exhausted) -> Decision:
    return Decision(
        policy="exhaustive",
        goal=found.goal,
        objective=found.objective,
        bound=found.objective if found.exact else None,
        gap=0.0 if found.exact else None,
        optimal=found.exact,
    )
