"""Policy "oserve-paper": OServe as its authors run it, as far as that is known.

Known from reading notes of arXiv 2602.12151: each minute the search of ``oserve_paper`` runs from
the deployment in force on what is forecast, and what it finds is switched to whenever it differs;
no test asks whether that pays. Rates come from a profile of each shape and type alone.

Inferred: rates are those at saturation, since no latency target appears in the notes
(``targets=True`` bounds them by the models' targets instead). KV capacity is within them, so that
the arcs' own ceilings e[k, j] never bind. While all demand can be served, the shares are those of
the flow at the greatest headroom, which loads replicas evenly; the maximum flow itself is one of
many then, and may fill one replica while others idle.
"""

from collections import Counter

import numpy as np

from services.scheduler.policies.capacity import RateSource, build, standing
from services.scheduler.policies.capacity_plan import brief, place_counts, spread, weights
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.costs import ANY_TARGET
from services.scheduler.policies.flow import Array
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.oserve_paper import Found, Lower, search
from services.scheduler.policies.weights import planned

PERIOD_S = 60.0


class OServePaper:
    """Registered as "oserve-paper"."""

    period_s = PERIOD_S
    slow = True

    def __init__(
        self,
        source: RateSource | None = None,
        *,
        lower: Lower = "lp",
        targets: bool = False,
    ) -> None:
        self._source = source or CostRates()
        self._lower: Lower = lower
        self._target = None if targets else ANY_TARGET

    def plan(self, problem: Problem) -> Planned:
        every = build(problem, self._source, target=self._target)
        table = every.only(every.servable())
        if not table.columns or not table.types:
            return Planned(plan=None, reason=every.shortcomings() or "no GPU is on offer")
        known = standing(problem.in_force, table.pools)
        start = Counter({column: n for column, n in known.items() if column in table.columns})
        models = [model.model_id for model in problem.models]
        found = search(table, start, models, lower=self._lower)
        if not found.counts:
            return Planned(plan=None, reason="not one replica finds room on the GPUs on offer")
        placed = place_counts(table, found.counts, problem.in_force)
        usable = table.rates * table.instance(placed.counts).copies[:, None]
        rows = weights(table, placed, _shares(found, usable))
        total = float(table.demand.sum())
        reason = (
            f"{brief(found.counts)} serves {found.flow.served:.3g} of {total:.3g} requests/s, "
            f"{found.even.headroom:.3g} times the demand, found in {found.iterations} iterations "
            f"over {found.deployments} deployments"
        )
        notes = [reason, every.shortcomings(), placed.reason]
        return planned(
            placed.replicas,
            rows,
            reason="; ".join(note for note in notes if note),
            dropped=placed.dropped,
        )


def _shares(found: Found, usable: Array) -> Array:
    """[S, J]: those of the even flow while all is served, else of the maximum flow; a type that the
    latter leaves out entirely goes where it can be served, in proportion to rates."""
    flow = found.even if found.even.headroom >= 1.0 else found.flow
    shares = np.where(flow.sent.any(axis=0), flow.shares(), spread(usable))
    return spread(np.where(usable > 0, shares, 0.0))
