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
             for every type j; T is more than any t can be. It follows from the others, and keeps a
             type that takes next to no time from being served by nothing, within rounding
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

from collections.abc import Collection, Mapping
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
    counts y and, divided by T, the shares z of the arcs in ``arcs`` and, for "headroom", t; then u
    and z' of each scenario. ``unit`` times cost @ v is the objective in the goal's terms."""

    cost: Array
    rows: csr_array
    lower: Array
    upper: Array
    floor: Array
    ceiling: Array
    integrality: npt.NDArray[np.int_]
    arcs: tuple[Index, Index]
    scale: float
    unit: float


class _Rows:
    """Sparse rows, block by block."""

    def __init__(self, width: int) -> None:
        self._width = width
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

    def matrix(self) -> tuple[csr_array, Array, Array]:
        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        shape = (self._count, self._width)
        rows = csr_array((value, (row, column)), shape=shape)
        return rows, np.concatenate(self._lower), np.concatenate(self._upper)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Arcs:
    """Arcs of some types: columns, types, and the time of a replica that all of a type takes."""

    s: Index
    j: Index
    time: Array


def formulate(
    table: Table, goal: Goal, terms: Terms, *, scenarios: Collection[Column] = ()
) -> Joint:
    """The program of ``goal``, with what is left after a loss of each of the ``scenarios``. ``table``
    has a column, and a type unless the goal is "thrift"."""
    columns = len(table.columns)
    scale = most_headroom(table) if goal == "headroom" else 1.0
    packing, room = pack_rows(table)
    floor = np.array([float(terms.floor.get(column, 0)) for column in table.columns])
    ceiling = np.where(dominated(table, goal, terms), 0.0, _ceiling(table, packing, room))
    arcs = _arcs(table, ceiling, scale)
    own = [_only(table, arcs, lost.model_id) for lost in scenarios]
    t = columns + len(arcs.s)  # where t is, if it is
    first = t + (goal == "headroom")
    starts = first + np.cumsum([0, *(1 + len(part.s) for part in own)])
    rows = _Rows(int(starts[-1]))
    load = terms.load if goal in {"gentle", "thrift"} else 1.0
    _flow(rows, table, arcs, start=columns, load=load, goal=goal, t=t)
    _cover(rows, table, ceiling, goal=goal, t=t)
    rows.add((-np.inf, room), len(room), (*np.nonzero(packing), packing[np.nonzero(packing)]))
    for model_id, count in terms.replicas_min().items():
        mine = [s for s, column in enumerate(table.columns) if column.model_id == model_id]
        rows.add((count, np.inf), 1, (0, mine, 1.0))
    for lost, part, start in zip(scenarios, own, starts[:-1], strict=True):
        s = table.columns.index(lost)
        rows.add((-np.inf, 0.0), 1, (0, [s, start], [1.0, -max(1.0, ceiling[s])]))
        load = terms.load_after_loss() if goal in {"gentle", "thrift"} else 1.0
        _flow(rows, table, part, start=start + 1, load=load, goal=goal, t=t, lost=(s, start))
    matrix, lower, upper = rows.matrix()
    extra = int(starts[-1]) - columns
    cost, unit = _cost(table, goal, terms, arcs)
    integrality = np.concatenate([np.ones(columns, np.int_), np.zeros(extra, np.int_)])
    integrality[starts[:-1]] = 1
    most = np.concatenate([ceiling, np.full(extra, np.inf)])
    most[starts[:-1]] = 1.0
    return Joint(
        cost=np.concatenate([cost, np.zeros(int(starts[-1]) - len(cost))]),
        rows=matrix, lower=lower, upper=upper,
        floor=np.concatenate([floor, np.zeros(extra)]), ceiling=most,
        integrality=integrality, arcs=(arcs.s, arcs.j), scale=scale, unit=unit,
    )  # fmt: skip


def _flow(
    rows: _Rows, table: Table, arcs: _Arcs, *, start: int, load: float, goal: Goal, t: int,
    lost: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Rows "share" and "types" of the arcs at ``start``, or "rest" and "types'" where one replica
    of the column ``lost`` [0] is, if variable ``lost`` [1] is 1."""
    at = start + np.arange(len(arcs.s))
    if lost:  # columns and types of one model
        columns, k = np.unique(arcs.s, return_inverse=True)
        types, i = np.unique(arcs.j, return_inverse=True)
        gone = [(np.flatnonzero(columns == lost[0]), lost[1], 1.0)]
    else:
        columns, k = np.arange(len(table.columns)), arcs.s
        types, i, gone = np.arange(len(table.types)), arcs.j, []
    have = (np.arange(len(columns)), columns, -1.0)
    rows.add((-np.inf, 0.0), len(columns), (k, at, arcs.time / load), have, *gone)
    count = len(types)
    sums = (i, at, 1.0)
    if goal == "headroom":
        rows.add((0.0, 0.0), count, sums, (np.arange(count), t, -1.0))
    else:
        rows.add((-np.inf if goal == "served" else 1.0, 1.0), count, sums)


def _cover(rows: _Rows, table: Table, ceiling: Array, *, goal: Goal, t: int) -> None:
    if goal == "served":
        return
    s, j = np.nonzero((table.rates > 0) & (ceiling > 0)[:, None])
    count = len(table.types)
    if goal == "headroom":
        rows.add((0.0, np.inf), count, (j, s, 1.0), (np.arange(count), t, -1.0))
    else:
        rows.add((1.0, np.inf), count, (j, s, 1.0))


def _arcs(table: Table, ceiling: Array, scale: float) -> _Arcs:
    s, j = np.nonzero((table.rates > 0) & (ceiling > 0)[:, None])
    time = np.maximum(scale * table.demand[j] / table.rates[s, j], TIME_MIN)
    return _Arcs(s=s, j=j, time=time)


def _only(table: Table, arcs: _Arcs, model_id: str) -> _Arcs:
    mine = np.array([table.types[j].model_id == model_id for j in arcs.j], np.bool_)
    return _Arcs(s=arcs.s[mine], j=arcs.j[mine], time=arcs.time[mine])


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


def counts_of(table: Table, values: Array) -> Mapping[Column, int]:
    """Counts above 0, of whole numbers [S]."""
    return {column: int(y) for column, y in zip(table.columns, values, strict=True) if y > 0}
