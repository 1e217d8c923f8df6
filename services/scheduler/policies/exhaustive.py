"""The best deployment, by looking at every one there is: for clusters that are small enough.

A deployment is a count of replicas for each column; the lower level (``flow``) says what it is
worth: its headroom, or what it serves where no deployment serves some of every type. Exhaustive
search is what OServe (arXiv 2602.12151) compares its own search with; how its authors enumerate is
not known. Here only what is proven to be no better is left out:

- A deployment that has room for another replica: with it, it does no worse.
- A column of which every replica could be replaced by m >= 1 replicas of another column of the same
  model and pool, which together need no more GPUs, nor a larger unit on one node, and serve no less
  of every type; and columns that serve nothing, beyond the least count of their model.
- The flow of a deployment of which a bound says that it is no better than the best so far. The
  duals of any flow (``flow.duals``) bound every deployment: with counts y, it is worth no more than
  sum_k pi[k] y[k] + sum_j mu[j], and the one whose duals they are exactly that. Flows are solved in
  falling order of what the bounds leave possible (as in J. F. Benders, 1962), until nothing better
  is.

So no other deployment has a better objective than the result, to within the linear solver's
tolerance. The work is bounded: of too many deployments some are looked at, evenly spread in the
order of listing, and when there are too many flows to solve the first ones are; the result is then
the best of these, and says so.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array, Flow, best_flow, duals
from services.scheduler.policies.joint_terms import plannable
from services.scheduler.policies.packings import Packings

LISTED_MAX = 50_000  # deployments that are all looked at
SPREAD_MAX = 5_000  # looked at where there are more: each takes longer to find
FLOWS_MAX = 2_000  # of these, flows solved: a few milliseconds each
NOTHING = 1e-9  # headroom: a solver's zero
BETTER = 1e-9  # relative: less is rounding

Goal = Literal["headroom", "served"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Exhausted:
    """The best deployment. ``objective``: its headroom, or requests/s served; ``flow`` is [S, J] in
    the order of the table's columns. ``total`` deployments there are, ``listed`` of them were
    looked at, and ``flows`` flows solved; ``exact``: no other is better."""

    goal: Goal
    counts: Mapping[Column, int]
    objective: float
    flow: Flow
    total: int
    listed: int
    flows: int
    exact: bool


def exhaust(
    table: Table,
    least: Mapping[str, int],
    *,
    listed_max: int = LISTED_MAX,
    flows_max: int = FLOWS_MAX,
) -> Exhausted | None:
    """The deployment of greatest headroom with ``least`` replicas by model, or if none has any, the
    one that serves most. None when no deployment looked at has as many replicas."""
    listing = _listed(table, least, listed_max)
    if not listing.counts.size:
        return None
    found = _best(table, listing, "headroom", flows_max)
    if found.objective <= NOTHING:
        found = _best(table, listing, "served", flows_max)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Listing:
    """``counts`` [P, S] of the deployments with replicas enough, of ``listed`` out of ``total``."""

    counts: Array
    listed: int
    total: int


def kept_columns(table: Table) -> list[int]:
    """Columns that no other replaces; of equal ones the first."""
    kept = [s for s, column in enumerate(table.columns) if plannable(column)]
    for s in tuple(kept):
        if any(_replaces(table, other, s) for other in kept if other != s):
            kept.remove(s)
    return kept


def _replaces(table: Table, one: int, other: int) -> bool:
    """Whether some replicas of column ``one`` do what a replica of ``other`` does. That is
    transitive, so what is replaced by a column that is itself replaced has a substitute left."""
    first, second = table.columns[one], table.columns[other]
    if (first.model_id, first.pool) != (second.model_id, second.pool):
        return False
    pool = table.pools[first.pool]
    times = second.shape.gpus // first.shape.gpus
    return (
        times >= 1
        and pool.unit(first.shape)[0] <= pool.unit(second.shape)[0]
        and bool(np.all(times * table.rates[one] >= table.rates[other]))
    )


def _listed(table: Table, least: Mapping[str, int], listed_max: int) -> _Listing:
    kept = kept_columns(table)
    pools: list[tuple[list[int], Packings]] = []
    for pool in table.pools.values():
        own = [s for s in kept if table.columns[s].pool == pool.name]
        columns = [table.columns[s] for s in own]
        useful = [bool(table.rates[s].any()) for s in own]
        bounds = [
            None if serves else least.get(column.model_id, 0)
            for column, serves in zip(columns, useful, strict=True)
        ]
        pools.append((own, Packings(pool, columns, count_max=bounds)))
    total = prod(packings.total for _, packings in pools)
    if total <= listed_max:
        chosen = list(product(*(packings for _, packings in pools)))
    else:
        some = min(listed_max, SPREAD_MAX)
        chosen = [_at(i * total // some, [ways for _, ways in pools]) for i in range(some)]
    counts = np.zeros((len(chosen), len(table.columns)))
    order = [s for own, _ in pools for s in own]
    counts[:, order] = [[count for way in ways for count in way] for ways in chosen]
    enough = np.ones(len(chosen), dtype=bool)
    for model_id, count in least.items():
        own = [s for s, column in enumerate(table.columns) if column.model_id == model_id]
        enough &= counts[:, own].sum(axis=1) >= count
    return _Listing(counts[enough], len(chosen), total)


def _at(rank: int, pools: Sequence[Packings]) -> tuple[tuple[int, ...], ...]:
    """The ways of all pools at a rank of their product, the last one's the first to change."""
    ways: list[tuple[int, ...]] = []
    for packings in reversed(pools):
        rank, own = divmod(rank, packings.total)
        ways.append(packings.at(own))
    return tuple(reversed(ways))


def _best(table: Table, listing: _Listing, goal: Goal, flows_max: int) -> Exhausted:
    """The flows that may be best, solved in falling order of their bounds."""
    bounds = _first_bounds(table, listing.counts, goal)
    best, at, flows = -np.inf, 0, 0
    while flows < flows_max and bounds.max() > _more_than(best):
        tried = int(np.argmax(bounds))
        found = duals(table.instance(_counts(table, listing.counts[tried])), goal)
        flows += 1
        if found.optimum > _more_than(best):
            best, at = found.optimum, tried
        fixed = 0.0 if goal == "headroom" else np.maximum(table.demand - found.types, 0.0).sum()
        bounds = np.minimum(bounds, listing.counts @ found.replica + fixed)
        bounds[tried] = -np.inf
    counts = _counts(table, listing.counts[at])
    flow = best_flow(table.instance(counts), goal)
    assert flow is not None, "no flow at all is a flow"
    return Exhausted(
        goal=goal,
        counts=counts,
        objective=flow.headroom if goal == "headroom" else flow.served,
        flow=flow,
        total=listing.total,
        listed=listing.listed,
        flows=flows,
        exact=bool(bounds.max() <= _more_than(best)) and listing.listed == listing.total,
    )


def _more_than(best: float) -> float:
    return best + BETTER * abs(best) if best > -np.inf else best


def _counts(table: Table, row: Array) -> Counter[Column]:
    return Counter({column: int(y) for column, y in zip(table.columns, row, strict=True) if y > 0})


def _first_bounds(table: Table, counts: Array, goal: Goal) -> Array:
    """[P]: what no deployment exceeds, before any flow is solved: each type has every replica to
    itself."""
    alone = counts @ table.rates
    if goal == "headroom":
        return (alone / table.demand).min(axis=1)
    return np.minimum(alone, table.demand).sum(axis=1)
