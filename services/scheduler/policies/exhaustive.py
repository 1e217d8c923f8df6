"""The best deployment, by looking at every one there is: for clusters that are small enough.

A deployment is a count of replicas for each column; the lower level (``flow``) says what it is
worth: its headroom, or what it serves where no deployment serves some of every type. Exhaustive
search is what OServe (arXiv 2602.12151) compares its own search with; how its authors enumerate is
not known. Here only what is proven to be no better is left out:

- A deployment that has room for another replica: with it, it does no worse.
- A column of which every replica could be replaced by m >= 1 replicas of another column of the same
  model and pool, which together need no more GPUs, nor a larger unit on one node, and serve no less
  of every type; and columns that serve nothing, beyond the least count of their model.
- The flow of a deployment whose price shows that it is no better than the best so far. By duality
  (as in J. F. Benders, 1962), with counts y, rates n, demand d and any weights w[j] >= 0

      headroom <= sum_k y[k] max_j w[j] n[k, j] / d[j]                         where sum_j w[j] = 1
      served   <= sum_k y[k] max_j (1 - w[j]) n[k, j] + sum_j w[j] d[j]        where w[j] <= 1

  and the duals of each flow that is solved are the weights that make this exact for it. Flows are
  solved in falling order of what these bounds leave possible, until nothing better is.

The result has a better objective than any other deployment, or an equal one: no gap is involved
beyond the solver's tolerance. ``listed`` and ``flows`` bound the work; when either is too small, the
result is the best of what was looked at, and says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import Literal

import numpy as np
from scipy.optimize import linprog

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array, Flow, Program, extract, formulate, verify
from services.scheduler.policies.joint import plannable
from services.scheduler.policies.packings import Packings

LISTED_MAX = 50_000  # deployments looked at
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
    ways = [list(islice(packings, listed_max)) for _, packings in pools]
    chosen = list(islice(product(*ways), listed_max))
    counts = np.zeros((len(chosen), len(table.columns)))
    order = [s for own, _ in pools for s in own]
    counts[:, order] = [[count for way in ways for count in way] for ways in chosen]
    enough = np.ones(len(chosen), dtype=bool)
    for model_id, count in least.items():
        own = [s for s, column in enumerate(table.columns) if column.model_id == model_id]
        enough &= counts[:, own].sum(axis=1) >= count
    total = prod(packings.total for _, packings in pools)
    return _Listing(counts[enough], len(chosen), total)


def _best(table: Table, listing: _Listing, goal: Goal, flows_max: int) -> Exhausted:
    """The flows that may be best, solved in falling order of their bounds."""
    bounds = np.full(len(listing.counts), np.inf)
    for weights in _first_weights(table, goal):
        bounds = np.minimum(bounds, _bound(table, listing.counts, goal, weights))
    best: tuple[float, int, Flow] | None = None
    flows = 0
    while True:
        at = int(np.argmax(bounds))
        if best is not None and bounds[at] <= best[0] * (1 + BETTER):
            break
        if flows == flows_max:
            break
        flow, weights = _solved(table, listing.counts[at], goal)
        flows += 1
        value = flow.headroom if goal == "headroom" else flow.served
        if best is None or value > best[0]:
            best = value, at, flow
        bounds = np.minimum(bounds, _bound(table, listing.counts, goal, weights))
        bounds[at] = -np.inf
    assert best is not None, "there is a deployment, and a flow may be solved"
    proven = bool(bounds.max() <= best[0] * (1 + BETTER))
    counts = listing.counts[best[1]]
    return Exhausted(
        goal=goal,
        counts={column: int(y) for column, y in zip(table.columns, counts, strict=True) if y > 0},
        objective=best[0],
        flow=best[2],
        total=listing.total,
        listed=listing.listed,
        flows=flows,
        exact=proven and listing.listed == listing.total,
    )


def _first_weights(table: Table, goal: Goal) -> list[Array]:
    """Before any flow is solved: each type alone, all of them alike, or none."""
    types = len(table.types)
    if goal == "served":
        return [np.zeros(types), np.ones(types)]
    return [*np.eye(types), np.full(types, 1.0 / types)]


def _bound(table: Table, counts: Array, goal: Goal, weights: Array) -> Array:
    """[P]: no deployment of ``counts`` does better, whatever ``weights`` [J] are."""
    if goal == "headroom":
        each = (table.rates * (weights / table.demand)).max(axis=1, initial=0.0)
        return counts @ each
    each = (table.rates * (1.0 - weights)).max(axis=1, initial=0.0)
    return counts @ each + float(weights @ table.demand)


def _solved(table: Table, counts: Array, goal: Goal) -> tuple[Flow, Array]:
    """The best flow of ``counts`` [S], and the weights that prove it."""
    instance = table.instance(dict(zip(table.columns, (int(y) for y in counts), strict=True)))
    program = formulate(instance, goal)
    variables, weights = _with_duals(program, table.demand)
    flow = extract(instance, program, variables)
    wrong = verify(instance, flow, served_max=np.inf if goal == "headroom" else 1.0)
    assert not wrong, wrong
    return flow, weights


def _with_duals(program: Program, demand: Array) -> tuple[Array, Array]:
    """Variables and weights of the types' rows. Weights that are slightly off prove a little less,
    and nothing wrong."""
    types, alike = len(demand), np.full(len(demand), 1.0 / len(demand))
    if not program.cost.size:
        return np.zeros(0), np.zeros(types)
    found = linprog(
        program.cost,
        A_ub=program.upper,
        b_ub=program.upper_bounds,
        A_eq=program.equal,
        b_eq=program.equal_bounds,
        bounds=[(0.0, float(ceiling)) for ceiling in program.ceilings],
        method="highs",
    )
    assert found.status == 0, found.message
    variables = np.asarray(found.x, dtype=np.float64)
    if program.objective == "served":
        duals = np.asarray(found.ineqlin.marginals, dtype=np.float64)[-types:]
        return variables, np.clip(-duals / demand, 0.0, 1.0)
    duals = np.abs(np.asarray(found.eqlin.marginals, dtype=np.float64))
    total = float(duals.sum())
    return variables, duals / total if total > 0 else alike
