"""The program of a joint plan, as rows over variables: how many replicas of each column, and which
share of each type goes to each.

    n[s, j]  requests/s of one replica of column s (model, pool, shape) that saw type j alone
    d[j]     arrivals of type j;  g[s] GPUs of one replica;  b[s] GPUs of it that share a node
    p[s]     price of one replica for an hour
    y[s]     replicas of column s, an integer
    z[s, j]  share of type j that column s gets; those of other models' columns are 0

    share    sum_j d[j] z[s, j] / n[s, j] <= load * y[s]            every column s
    types    sum_s z[s, j] = t (headroom), 1 (gentle, thrift) or <= 1 (served)      every type j
    cover    sum over s with n[s, j] > 0 of y[s] >= t / T (headroom) or 1 (gentle, thrift)
             for every type j, or twice that to survive a loss; T is more than any t can be. It
             follows from the others, and keeps a type that takes next to no time from being served
             by nothing, within rounding
    packing  sum over s of the pool with b[s] >= c of g[s] y[s] <= sum over nodes of c * [GPUs / c]
             for every pool and size c: sizes are powers of two, so that larger ones leave room in
             whole multiples of c, and this bound is reached by placing the largest first
    models   sum over s of the model of y[s] >= least[model]
    floor    y[s] >= floor[s]                                       counts that are given, if any

With ``survive``, what is left after the loss of one replica of column c has to carry t times the
demand (headroom) or all of it (gentle, thrift). The other models lose nothing, so that this is
about the model of c alone. u[c] is 1 if there is any replica of c, z'[c, s, j] what goes where
after the loss, Y[c] the most replicas of c that there can be:

    used     y[c] <= Y[c] u[c]                                      u[c] 0 or 1
    rest     sum_j d[j] z'[c, s, j] / n[s, j] <= load' * (y[s] - [s = c] u[c])
    types'   sum_s z'[c, s, j] = t or 1                             every type j of the model

With u[c] = 0 nothing is lost, and z' = z will do: no large constant is needed to switch a scenario
off. load' is 1 (or ``load`` where that is more): after a loss replicas may be full.

    headroom  max t: how many times the demand would fit, the same for all types and models
    gentle    min sum_sj d[j] cost[s, j] z[s, j]
    served    max sum_sj d[j] z[s, j]
    thrift    min sum_s p[s] y[s]: GPUs may be left unused

Demand is counted in multiples T = GPUs / sum_j (d[j] / most requests/s of type j by any GPU), which
no headroom exceeds and most come close to, so that all numbers are of the order of 1 or of a count.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array
from services.scheduler.policies.joint_dominance import dominated
from services.scheduler.policies.joint_terms import Goal, Terms, plannable

ROUNDING = 1e-9
TIME_MIN = 1e-6  # of a replica, that a type takes: less would be lost in the solver's tolerance

Index = npt.NDArray[np.intp]
Entries = tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]  # rows, columns, values


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Joint:
    """min cost @ v with lower <= rows @ v <= upper and floor <= v <= ceiling. Variables are the
    counts y; the shares z of each column and type with n > 0 and, for "headroom", t, these divided
    by T; then u and z' of each scenario. ``unit`` times cost @ v is the objective in the goal's
    terms."""

    cost: Array
    rows: csr_array
    lower: Array
    upper: Array
    floor: Array
    ceiling: Array
    integrality: npt.NDArray[np.int_]
    unit: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Arcs:
    """Columns, types, and how much of a replica's time all of the type takes."""

    s: Index
    j: Index
    time: Array

    def of(self, table: Table, model_id: str) -> "_Arcs":
        own = [column.model_id == model_id for column in table.columns]
        mine = np.array(own, np.bool_)[self.s]
        return _Arcs(s=self.s[mine], j=self.j[mine], time=self.time[mine])


class _Rows:
    """Sparse rows, block by block. ``t``: where that variable is, None where there is none."""

    def __init__(self, width: int, goal: Goal, t: int | None) -> None:
        self._width, self._goal, self._t = width, goal, t
        self._entries: list[tuple[Index, Index, Array]] = []
        self._lower: list[Array] = []
        self._upper: list[Array] = []
        self._count = 0

    def add(self, bounds: tuple[Array | float, Array | float], count: int, *parts: Entries) -> None:
        """``count`` rows within ``bounds``; rows of the ``parts`` are counted from 0."""
        for rows, columns, values in parts:
            row, column, value = np.broadcast_arrays(rows, columns, values)
            self._entries.append(
                (row.astype(np.intp) + self._count, column.astype(np.intp), value.astype(float))
            )
        self._lower.append(np.broadcast_to(np.asarray(bounds[0], float), count))
        self._upper.append(np.broadcast_to(np.asarray(bounds[1], float), count))
        self._count += count

    def flow(
        self, arcs: _Arcs, start: int, load: float, *, lost: tuple[int, int] | None = None
    ) -> None:
        """Rows "share" and "types" of ``arcs``, whose variables begin at ``start``. Rows "rest"
        and "types'", where one replica of the column ``lost`` [0] is, if variable ``lost`` [1] is
        1."""
        at = start + np.arange(len(arcs.s))
        columns, k = np.unique(arcs.s, return_inverse=True)
        have: Entries = (np.arange(len(columns)), columns, -1.0)
        gone: list[Entries] = [(np.flatnonzero(columns == lost[0]), lost[1], 1.0)] if lost else []
        time: Entries = (k, at, arcs.time / load)
        self.add((-np.inf, 0.0), len(columns), time, have, *gone)
        types, i = np.unique(arcs.j, return_inverse=True)
        self._summed((1.0, 1.0), len(types), (i, at, 1.0), times=1.0)

    def cover(self, arcs: _Arcs, types: int, times: float) -> None:
        """Rows "cover", of all types: those without an arc have no headroom."""
        if self._goal != "served":
            self._summed((1.0 * times, np.inf), types, (arcs.j, arcs.s, 1.0), times=times)

    def _summed(
        self, bounds: tuple[float, float], count: int, part: Entries, *, times: float
    ) -> None:
        """Rows of sums that are within ``bounds``, or the same relative to t."""
        if self._t is not None:
            t: Entries = (np.arange(count), self._t, -times)
            self.add((0.0, bounds[1] - bounds[0]), count, part, t)
        else:
            least = -np.inf if self._goal == "served" else bounds[0]
            self.add((least, bounds[1]), count, part)

    def matrix(self) -> tuple[csr_array, Array, Array]:
        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        shape = (self._count, self._width)
        rows = csr_array((value, (row, column)), shape=shape)
        return rows, np.concatenate(self._lower), np.concatenate(self._upper)


def formulate(
    table: Table, goal: Goal, terms: Terms, *, scenarios: Collection[Column] = ()
) -> Joint:
    """The program of ``goal``, with what is left after a loss of a replica of each of the
    ``scenarios``. ``table`` has a column, and a type unless the goal is "thrift"."""
    columns = len(table.columns)
    scale = most_headroom(table) if goal == "headroom" else 1.0
    packing, room = pack_rows(table)
    ceiling = np.where(dominated(table, goal, terms), 0.0, _ceiling(table, packing, room))
    arcs = _arcs(table, ceiling, scale)
    own = [arcs.of(table, lost.model_id) for lost in scenarios]
    first = columns + len(arcs.s) + (goal == "headroom")
    starts = first + np.cumsum([0, *(1 + len(part.s) for part in own)])
    width = int(starts[-1])
    rows = _Rows(width, goal, first - 1 if goal == "headroom" else None)
    loaded = goal in {"gentle", "thrift"}
    rows.flow(arcs, columns, terms.load if loaded else 1.0)
    rows.cover(arcs, len(table.types), 2.0 if terms.survive else 1.0)
    filled = np.nonzero(packing)
    rows.add((-np.inf, room), len(room), (filled[0], filled[1], packing[filled]))
    for model_id, count in terms.replicas_min().items():
        mine = [s for s, column in enumerate(table.columns) if column.model_id == model_id]
        rows.add((float(count), np.inf), 1, (0, mine, 1.0))
    for lost, part, start in zip(scenarios, own, starts, strict=False):  # starts has the end too
        s, u = table.columns.index(lost), int(start)
        rows.add((-np.inf, 0.0), 1, (0, [s, u], [1.0, -max(1.0, float(ceiling[s]))]))
        rows.flow(part, u + 1, terms.load_after_loss() if loaded else 1.0, lost=(s, u))
    matrix, lower, upper = rows.matrix()
    cost, unit = _cost(table, goal, terms, arcs)
    floor, most, whole = np.zeros(width), np.ones(width), np.zeros(width, np.int_)
    floor[:columns] = [float(terms.floor.get(column, 0)) for column in table.columns]
    most[:columns] = ceiling  # shares and t are 1 at most, u is 0 or 1
    whole[:columns], whole[starts[:-1]] = 1, 1
    return Joint(
        cost=np.concatenate([cost, np.zeros(width - len(cost))]), unit=unit,
        rows=matrix, lower=lower, upper=upper, floor=floor, ceiling=most, integrality=whole,
    )  # fmt: skip


def _arcs(table: Table, ceiling: Array, scale: float) -> _Arcs:
    s, j = np.nonzero((table.rates > 0) & (ceiling > 0)[:, None])
    time = np.maximum(scale * table.demand[j] / table.rates[s, j], TIME_MIN)
    return _Arcs(s=s, j=j, time=time)


def _cost(table: Table, goal: Goal, terms: Terms, arcs: _Arcs) -> tuple[Array, float]:
    """Of counts, shares and t, and its unit."""
    counts, shares = np.zeros(len(table.columns)), np.zeros(len(arcs.s))
    total = float(table.demand.sum())
    if goal == "headroom":
        return np.concatenate([counts, shares, [-1.0]]), -most_headroom(table)
    if goal == "thrift":
        return np.concatenate([terms.hourly(table), shares]), 1.0
    weight = table.demand[arcs.j] / total
    if goal == "served":
        return np.concatenate([counts, -weight]), -total
    assert terms.cost is not None, "gentle needs a cost for each column and type"
    least = np.where(table.rates > 0, terms.cost, np.inf).min(axis=0)
    usual = float((table.demand / total * least).sum())  # no plan costs less: of its order is 1
    unit = usual if 0.0 < usual < np.inf else 1.0
    return np.concatenate([counts, weight * terms.cost[arcs.s, arcs.j] / unit]), unit


def pack_rows(table: Table) -> tuple[Array, Array]:
    """Rows over counts [R, S], and GPUs that there are [R], of every pool and size in it."""
    rows: list[list[float]] = []
    room: list[float] = []
    for pool in table.pools.values():
        own = [(k, c) for k, c in enumerate(table.columns) if c.pool == pool.name and plannable(c)]
        for size in sorted({pool.unit(column.shape)[0] for _, column in own}):
            row = [0.0] * len(table.columns)
            for k, column in own:
                if pool.unit(column.shape)[0] >= size:
                    row[k] = float(column.shape.gpus)
            rows.append(row)
            room.append(float(sum(gpus // size * size for gpus in pool.node_gpus)))
    return np.array(rows).reshape(-1, len(table.columns)), np.array(room)


def most_headroom(table: Table) -> float:
    """No headroom exceeds it: every type takes the time of the GPUs that are quickest at it."""
    each = np.array([float(column.shape.gpus) for column in table.columns])
    per_gpu = (table.rates / each[:, None]).max(axis=0, initial=0.0)
    if not np.all(per_gpu > 0):
        return 1.0  # a type that nothing serves: there is no headroom
    bound = table.gpus() / float((table.demand / per_gpu).sum())
    return bound if 0.0 < bound < np.inf else 1.0


def _ceiling(table: Table, packing: Array, room: Array) -> Array:
    """Most replicas of each column that its pool has GPUs for, were they alone."""
    most = [
        min((float(room[i]) for i in np.flatnonzero(packing[:, k])), default=0.0) / c.shape.gpus
        for k, c in enumerate(table.columns)
    ]
    return np.floor(np.array(most) + ROUNDING)
