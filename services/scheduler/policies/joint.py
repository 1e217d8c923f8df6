"""How many replicas of each shape, and which share of each type goes to each shape: one program.

OServe (arXiv 2602.12151) searches shapes and solves a flow for each. Identical replicas are
interchangeable, so a count of each is enough, and both questions are one small mixed-integer
program, as in Demystifying Cost-Efficiency (arXiv 2502.00722) with shapes in place of GPU types.
It is solved to a proven gap by HiGHS.

    n[s, j]  requests/s of one replica of column s (model, pool, shape) that saw type j alone
    d[j]     arrivals of type j;  g[s] GPUs of one replica;  b[s] GPUs of it that share a node
    y[s]     replicas of column s, an integer
    z[s, j]  share of type j that column s gets; those of other models' columns are 0

    share    sum_j d[j] z[s, j] / n[s, j] <= load * y[s]            every column s
    types    sum_s z[s, j] = t  (headroom)  or 1  (gentle)  or <= 1  (served)    every type j
    packing  sum over s of the pool with b[s] >= c of g[s] y[s] <= sum over nodes of c * [GPUs / c]
             for every pool and size c: sizes are powers of two, so that larger ones leave room in
             whole multiples of c, and this bound is reached by placing the largest first
    models   sum over s of the model of y[s] >= 1                   every model in ``wanted``
    floor    y[s] >= floor[s]                                       counts that are given, if any

    headroom  max t: how many times the demand would fit, the same for all types and models
    gentle    min sum_sj d[j] cost[s, j] z[s, j]
    served    max sum_sj d[j] z[s, j]
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.costs import RANKS, STAGES
from services.scheduler.policies.flow import Array

Goal = Literal["headroom", "gentle", "served"]
GAP_MAX = 1e-4
NODES_MAX = 20_000  # of the search tree: a bound that does not depend on the machine's speed
ROUNDING = 1e-9
TIME_MIN = 1e-6  # of a replica, that a type takes: less would be lost in the solver's tolerance


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """``wanted``: models that get a replica whatever is expected of them; ``load`` and ``cost``
    [S, J] are those of "gentle"."""

    wanted: Collection[str] = ()
    load: float = 1.0
    cost: Array | None = None
    floor: Mapping[Column, int] = field(default_factory=dict[Column, int])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Joint:
    """min cost @ v with lower <= rows @ v <= upper and floor <= v <= ceiling. Variables are the
    counts y and, divided by ``scale``, the shares z of the arcs in ``arcs`` and, for "headroom",
    t."""

    goal: Goal
    cost: Array
    rows: Array
    lower: Array
    upper: Array
    floor: Array
    ceiling: Array
    integrality: npt.NDArray[np.int_]
    arcs: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """``objective`` in the terms of ``goal`` (t, cost, or requests/s); none of this program has a
    better one than ``bound``. ``optimal``: proven to within ``GAP_MAX``."""

    goal: Goal
    counts: Mapping[Column, int]
    shares: Array
    objective: float
    bound: float
    optimal: bool


def plannable(column: Column) -> bool:
    """Whether new replicas may have this shape: others are only kept."""
    return column.shape.tp in RANKS and column.shape.pp in STAGES


def formulate(table: Table, goal: Goal, terms: Terms) -> Joint:
    """The program of ``goal``."""
    s, j = np.nonzero(table.rates > 0)
    columns, arcs = len(table.columns), len(s)
    extra = 1 if goal == "headroom" else 0
    scale = _scale(table) if goal == "headroom" else 1.0
    load = terms.load if goal == "gentle" else 1.0

    # Demand in multiples that are of the order of what fits, so that all numbers are of that of 1.
    share = np.zeros((columns, columns + arcs + extra))
    time = scale / load * table.demand[j] / table.rates[s, j]
    share[s, columns + np.arange(arcs)] = np.maximum(time, TIME_MIN)
    share[np.arange(columns), np.arange(columns)] = -1.0

    types = np.zeros((len(table.types), columns + arcs + extra))
    types[j, columns + np.arange(arcs)] = 1.0
    types[:, columns + arcs :] = -1.0
    least, most = {"headroom": (0.0, 0.0), "gentle": (1.0, 1.0), "served": (-np.inf, 1.0)}[goal]

    packing, room = _packing(table)
    models = _models(table, terms.wanted)
    counted = np.vstack([packing, models])
    counted = np.hstack([counted, np.zeros((len(counted), arcs + extra))])

    below = [np.full(columns, -np.inf), np.full(len(types), least), np.full(len(room), -np.inf)]
    above = [np.zeros(columns), np.full(len(types), most), room]
    return Joint(
        goal=goal,
        cost=np.concatenate([np.zeros(columns), _prices(table, goal, terms), -np.ones(extra)]),
        rows=np.vstack([share, types, counted]),
        lower=np.concatenate([*below, np.ones(len(models))]),
        upper=np.concatenate([*above, np.full(len(models), np.inf)]),
        floor=np.concatenate([_floor(table, terms.floor), np.zeros(arcs + extra)]),
        ceiling=np.concatenate([_ceiling(table, packing, room), np.full(arcs + extra, np.inf)]),
        integrality=np.concatenate([np.ones(columns, np.int_), np.zeros(arcs + extra, np.int_)]),
        arcs=(s, j),
        scale=scale,
    )


def solve(program: Joint, *, time_limit_s: float) -> tuple[Array, float, bool] | None:
    """Variables, bound on the objective, and whether that is proven; None when nothing is
    feasible or nothing was found in time."""
    found = milp(
        program.cost,
        integrality=program.integrality,
        bounds=Bounds(program.floor, program.ceiling),
        constraints=LinearConstraint(program.rows, program.lower, program.upper),
        options={"mip_rel_gap": GAP_MAX, "node_limit": NODES_MAX, "time_limit": time_limit_s},
    )
    if found.x is None:
        return None
    return np.asarray(found.x, np.float64), float(found.mip_dual_bound), found.status == 0


def extract(
    table: Table, program: Joint, variables: Array, *, bound: float, optimal: bool
) -> Solution:
    """Counts as integers, shares [S, J], and the objective in the goal's terms."""
    columns = len(table.columns)
    s, j = program.arcs
    counts = np.rint(variables[:columns])
    shares = np.zeros_like(table.rates)
    shares[s, j] = program.scale * np.maximum(variables[columns : columns + len(s)], 0.0)
    shares[counts == 0] = 0.0  # the solver's tolerance leaves crumbs
    unit = {"headroom": -program.scale, "gentle": 1.0, "served": -float(table.demand.sum())}
    return Solution(
        goal=program.goal,
        counts={column: int(y) for column, y in zip(table.columns, counts, strict=True) if y > 0},
        shares=shares,
        objective=unit[program.goal] * float(program.cost @ variables),
        bound=unit[program.goal] * bound,
        optimal=optimal,
    )


def best_joint(table: Table, goal: Goal, terms: Terms, *, time_limit_s: float) -> Solution | None:
    """Formulate, solve, extract and verify; None when there is no such plan."""
    if not table.columns:
        return None
    program = formulate(table, goal, terms)
    found = solve(program, time_limit_s=time_limit_s)
    if found is None:
        return None
    solution = extract(table, program, found[0], bound=found[1], optimal=found[2])
    wrong = verify(table, solution.counts, wanted=terms.wanted)
    assert not wrong, wrong
    return solution


def verify(table: Table, counts: Mapping[Column, int], *, wanted: Collection[str]) -> list[str]:
    """What is wrong with ``counts``, without the program's rows: every replica is put on a node,
    the largest first. The flow has a check of its own (``flow.verify``)."""
    wrong = [
        f"{model_id} has no replica"
        for model_id in wanted
        if not any(column.model_id == model_id and y > 0 for column, y in counts.items())
    ]
    for pool in table.pools.values():
        free = list(pool.node_gpus)
        units: list[tuple[int, Column]] = []
        for column, count in counts.items():
            if column.pool == pool.name:
                size, times = pool.unit(column.shape)
                units += [(size, column)] * (times * count)
        for size, column in sorted(units, key=lambda unit: -unit[0]):
            node = next((i for i, left in enumerate(free) if left >= size), None)
            if node is None:
                wrong.append(f"no {size} GPUs left on a node of {pool.name} for {column}")
            else:
                free[node] -= size
    return wrong


def _packing(table: Table) -> tuple[Array, Array]:
    """Rows over counts, and GPUs that there are, of every pool and size in it."""
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


def _scale(table: Table) -> float:
    """Some headroom that cannot be exceeded by much: the type that fares worst with every GPU to
    itself."""
    gpus = table.gpus()
    each = np.array([float(column.shape.gpus) for column in table.columns])
    per_gpu = (table.rates / each[:, None]).max(axis=0, initial=0.0)
    bound = float((gpus * per_gpu / table.demand).min(initial=np.inf))
    return bound if 0 < bound < np.inf else 1.0


def _models(table: Table, wanted: Collection[str]) -> Array:
    rows = [[float(c.model_id == model_id) for c in table.columns] for model_id in sorted(wanted)]
    return np.array(rows).reshape(-1, len(table.columns))


def _prices(table: Table, goal: Goal, terms: Terms) -> Array:
    """Of the shares, in the order of the arcs."""
    s, j = np.nonzero(table.rates > 0)
    weight = table.demand[j] / table.demand.sum()
    if goal == "gentle":
        assert terms.cost is not None, "gentle needs a cost for each column and type"
        return weight * terms.cost[s, j]
    return -weight if goal == "served" else np.zeros(len(s))


def _floor(table: Table, given: Mapping[Column, int]) -> Array:
    return np.array([float(given.get(column, 0)) for column in table.columns])


def _ceiling(table: Table, packing: Array, room: Array) -> Array:
    """Most replicas of each column that its pool has GPUs for, were they alone."""
    most = [
        min((float(room[i]) for i in np.flatnonzero(packing[:, k])), default=0.0) / c.shape.gpus
        for k, c in enumerate(table.columns)
    ]
    return np.floor(np.array(most) + ROUNDING)
