"""Policy "melange": as few GPUs as the demand needs, each slice of it on one shape.

Melange (Griggs et al., arXiv 2404.14527) chooses among kinds of GPU; here shapes take their place.

    d[j]     requests/s of bucket j;  f slices of it, d[j] / f each
    n[s, j]  requests/s of bucket j that one replica of column s serves within its targets
    y[s]     replicas of column s, an integer;  p[s] price of one for one hour
    a[i, s]  1 if slice i, of bucket j(i), goes to column s, else 0

    min  sum_s p[s] y[s]
    with sum_s a[i, s] = 1                              every slice i
         sum_i a[i, s] d[j(i)] / (f n[s, j(i)]) <= y[s]    every column s

Known, from its released code and README (tyler-griggs/melange-release, 5dd1b3c): this program, the
largest throughput within a target for each kind and each bucket as input, f = 4 as enough in most
cases, prices per hour; no bound on how many GPUs there are, and no answer when there is none.

Inferred here:

- Buckets are the request types, instead of a grid over input and output lengths: that is all that a
  forecast tells of lengths.
- Slices of a bucket are alike, so the number of them on each column is all that matters: an integer
  from 0 to f in place of f binaries, which leaves the optimum what it is.
- No more GPUs than are on offer, packed on nodes, and the least replicas of models.
- Where the GPUs do not suffice, the demand is reduced alike for all buckets to what would fit if
  replicas could be cut up (the relaxation), and of its slices the most requests are served.
- Of what costs as little, that which takes the least of the replicas' time.
- A bucket's requests go as its slices do. What is left over of the GPUs idles, as in the original.
- Without prices each GPU costs 1. It is solved each minute, and moved to whenever it differs.
  ``Needs.survive`` and ``elastic`` change nothing: it leaves GPUs unused at all times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from services.scheduler.policies.capacity import Column, RateSource, Table, build
from services.scheduler.policies.capacity_plan import (
    brief,
    even_shares,
    place_counts,
    spread,
    weights,
)
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.flow import Array
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.joint_rows import pack_rows
from services.scheduler.policies.joint_terms import Terms, plannable
from services.scheduler.policies.minimums import left_out, minimums
from services.scheduler.policies.weights import planned
from shared.messages.decisions import Decision

PERIOD_S = 60.0
SLICES = 4  # of each bucket
GAP_MAX = 1e-4
NODES_MAX = 20_000  # of the search tree: a bound that does not depend on the machine's speed
PROGRAMS = 12  # solved for one decision at most, each in its part of the time limit


SLICE_TIME_MIN = 1e-4  # of a replica, that a slice takes: less would be lost in a tolerance
NOTHING = 1e-9  # of the demand: a solver's zero
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Bought:
    """``counts`` of the columns; ``slices`` [S, J]: of each bucket, how many went to each.
    ``share`` of the demand that was planned for: all of it when it fits. ``price`` per hour, with
    its ``bound``; None when that was not what counted."""

    counts: Mapping[Column, int]
    slices: Array
    share: float
    price: float | None = None
    bound: float | None = None


class Melange:
    """Registered as "melange"."""

    period_s = PERIOD_S
    slow = True

    def __init__(self, source: RateSource | None = None, *, slices: int = SLICES) -> None:
        self._source, self._slices = source or CostRates(), slices

    def plan(self, problem: Problem) -> Planned:
        every = build(problem, self._source)
        table = every.only(every.servable())
        if not table.columns or not table.types:
            return Planned(plan=None, reason=every.shortcomings() or "no GPU is on offer")
        bought = self._bought(problem, table)
        if bought is None or not bought.counts:
            return Planned(plan=None, reason="not one replica finds room on the GPUs on offer")
        placed = place_counts(table, bought.counts, problem.in_force)
        shares = _shares(table, bought, placed.counts)
        notes = [
            _about(table, bought),
            left_out(problem, {column.model_id for column in placed.counts}),
            every.shortcomings(),
            placed.reason,
        ]
        answer = planned(
            placed.replicas,
            weights(table, placed, shares),
            reason="; ".join(note for note in notes if note),
            dropped=placed.dropped,
        )
        return replace(answer, decision=_decision(bought))

    def _bought(self, problem: Problem, table: Table) -> Bought | None:
        prices = Terms(prices=problem.needs.gpu_prices).hourly(table)
        limit_s = problem.time_limit_s / PROGRAMS
        for least in minimums(problem, table):
            market = Market(table, prices, least, self._slices)
            found = market.cheapest(limit_s) or market.most(limit_s)
            if found is not None:
                return found
        return None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Program:
    """``rows`` over the variables, which are integers from 0 to ``ceiling``; ``time`` of a replica
    that a slice takes on each of the ``arcs``."""

    rows: tuple[LinearConstraint, ...]
    ceiling: Array
    arcs: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
    time: Array


class Market:
    """The programs of one table; ``prices`` [S] of a replica, ``least`` replicas by model, and
    ``slices`` of each bucket. Variables are the counts y and the slices a of the arcs (s, j)."""

    def __init__(self, table: Table, prices: Array, least: Mapping[str, int], slices: int) -> None:
        self._table, self._prices, self._slices = table, prices, slices
        packing, room = pack_rows(table)
        models = [
            [float(column.model_id == model_id) for column in table.columns]
            for model_id in sorted(least)
        ]
        self._counted = np.vstack([packing, np.array(models).reshape(-1, len(table.columns))])
        self._least = np.append(np.full(len(room), -np.inf), [least[id_] for id_ in sorted(least)])
        self._most = np.append(room, np.full(len(least), np.inf))
        self._ceiling = np.array([_most_alone(table, column) for column in table.columns])

    def cheapest(self, limit_s: float) -> Bought | None:
        """The least that carries all of the demand, and of what costs as little that whose replicas
        it takes the least time of; None where nothing carries it, or none is found in time."""
        program = self._program(1.0, every=True)
        cost = np.append(self._prices, np.zeros(len(program.arcs[0])))
        found = _solve(program, cost, limit_s)
        if found is None:
            return None
        price = float(cost @ found[0])
        capped = LinearConstraint(cost[None, :], -np.inf, price * (1 + ROUNDING))
        again = _solve(program, np.append(0.0 * self._prices, program.time), limit_s, capped)
        values = found[0] if again is None else again[0]
        return replace(self._bought(program, values, 1.0), price=price, bound=found[1])

    def most(self, limit_s: float) -> Bought | None:
        """What serves most of as much of the demand as would fit if replicas could be cut up; None
        where the least replicas do not fit."""
        share = self._relaxed()
        if share is None:
            return None
        program = self._program(share, every=False)
        demand = self._table.demand
        served = demand[program.arcs[1]] / demand.sum()
        found = _solve(program, np.append(0.0 * self._prices, -served), limit_s)
        return None if found is None else self._bought(program, found[0], share)

    def _program(self, share: float, *, every: bool) -> _Program:
        """Of ``share`` of the demand ``every`` slice, or any number of them."""
        table, columns = self._table, len(self._table.columns)
        with np.errstate(divide="ignore"):
            time = share * table.demand / (self._slices * table.rates)
        s, j = np.nonzero(time <= self._ceiling[:, None])
        each, arcs = np.maximum(time[s, j], SLICE_TIME_MIN), columns + np.arange(len(s))
        load = np.zeros((columns, columns + len(s)))
        load[s, arcs] = each
        load[np.arange(columns), np.arange(columns)] = -1.0
        sliced = np.zeros((len(table.types), columns + len(s)))
        sliced[j, arcs] = 1.0
        counted = np.hstack([self._counted, np.zeros((len(self._counted), len(s)))])
        return _Program(
            rows=(
                LinearConstraint(load, -np.inf, 0.0),
                LinearConstraint(sliced, float(self._slices) if every else 0.0, self._slices),
                LinearConstraint(counted, self._least, self._most),
            ),
            ceiling=np.append(self._ceiling, np.full(len(s), float(self._slices))),
            arcs=(s, j),
            time=each,
        )

    def _bought(self, program: _Program, values: Array, share: float) -> Bought:
        columns = self._table.columns
        slices = np.zeros_like(self._table.rates)
        slices[program.arcs] = values[len(columns) :]
        counts = {column: int(y) for column, y in zip(columns, values, strict=False) if y > 0}
        return Bought(counts=counts, slices=slices, share=share)

    def _relaxed(self) -> float | None:
        """How much of the demand fits if replicas could be cut up, at most 1: also where that is
        nothing, so that there are slices to choose from."""
        table, columns = self._table, len(self._table.columns)
        s, j = np.nonzero((table.rates > 0) & (self._ceiling > 0)[:, None])
        arcs, scale = np.arange(len(s)), float(table.demand.sum())
        load = np.zeros((columns, columns + len(s) + 1))
        load[s, columns + arcs] = table.demand[j] / scale / table.rates[s, j]
        load[np.arange(columns), np.arange(columns)] = -1.0
        shared = np.zeros((len(table.types), columns + len(s) + 1))
        shared[j, columns + arcs] = 1.0
        shared[:, -1] = -1.0
        counted = np.hstack([self._counted, np.zeros((len(self._counted), len(s) + 1))])
        has_least, has_most = np.isfinite(self._least), np.isfinite(self._most)
        found = linprog(
            np.append(np.zeros(columns + len(s)), -1.0),
            A_ub=np.vstack([load, counted[has_most], -counted[has_least]]),
            b_ub=np.concatenate([np.zeros(columns), self._most[has_most], -self._least[has_least]]),
            A_eq=shared,
            b_eq=np.zeros(len(table.types)),
            method="highs",
        )
        if found.x is None:
            return None
        share = float(found.x[-1]) / scale
        return min(1.0, share) if share > NOTHING else 1.0


def _solve(
    program: _Program, cost: Array, limit_s: float, *more: LinearConstraint
) -> tuple[Array, float] | None:
    """Integers of least ``cost``, and its bound; None when there are none, or none in time."""
    found = milp(
        cost,
        integrality=np.ones(len(cost), np.int_),
        bounds=Bounds(np.zeros(len(cost)), program.ceiling),
        constraints=[*program.rows, *more],
        options={"mip_rel_gap": GAP_MAX, "node_limit": NODES_MAX, "time_limit": limit_s},
    )
    if found.x is None:
        return None
    return np.rint(np.asarray(found.x, np.float64)), float(found.mip_dual_bound)


def _most_alone(table: Table, column: Column) -> float:
    """Replicas that the pool has room for, were they alone."""
    pool = table.pools[column.pool]
    if not plannable(column) or not pool.fits(column.shape):
        return 0.0
    return float(pool.room(pool.unit(column.shape)[0]) // column.shape.gpus)


def _shares(table: Table, bought: Bought, counts: Mapping[Column, int]) -> Array:
    """[S, J]: of each bucket by its slices; of one without any, by what can be served of it."""
    copies = table.instance(counts).copies[:, None]
    slices = np.where((copies > 0) & (table.rates > 0), bought.slices, 0.0)
    lost = ~slices.any(axis=0)
    return np.where(lost, spread(even_shares(table, counts)), spread(slices))


def _about(table: Table, bought: Bought) -> str:
    text, gpus = brief(bought.counts), sum(c.shape.gpus * n for c, n in bought.counts.items())
    if bought.price is not None:
        return (
            f"{text} carries all of the demand at the least price, {bought.price:.3g} per hour "
            f"(bound {bought.bound:.3g}), on {gpus} of {table.gpus()} GPUs"
        )
    return f"the GPUs do not suffice: {text} serves most of {bought.share:.3g} times the demand"


def _decision(bought: Bought) -> Decision:
    if bought.price is None or bought.bound is None:
        return Decision(policy="melange", goal="served")
    gap = max(0.0, bought.price - bought.bound) / bought.price if bought.price else 0.0
    return Decision(
        policy="melange",
        goal="thrift",
        objective=bought.price,
        bound=bought.bound,
        gap=gap,
        optimal=gap <= GAP_MAX,
    )
