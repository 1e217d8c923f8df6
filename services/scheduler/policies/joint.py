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
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.costs import RANKS, STAGES
from services.scheduler.policies.flow import Array

Goal = Literal["headroom", "gentle", "served"]
GAP_MAX = 1e-6
NODES_MAX = 20_000  # of the search tree: a bound that does not depend on the machine's speed
ENOUGH = 1e-9


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Joint:
    """min cost @ v with lower <= rows @ v <= upper and floor <= v <= ceiling. Variables are the
    counts y, the shares z of the arcs in ``arcs``, and for "headroom" t / ``scale``."""

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
    """``objective`` in the goal's terms (t, cost, or requests/s); no better plan of this program
    has more than ``bound``. ``optimal``: proven to within ``GAP_MAX``."""

    counts: Mapping[Column, int]
    shares: Array
    objective: float
    bound: float
    optimal: bool


def plannable(column: Column) -> bool:
    """Whether new replicas may have this shape: others are only kept."""
    return column.shape.tp in RANKS and column.shape.pp in STAGES


def formulate(
    table: Table,
    goal: Goal,
    *,
    wanted: Collection[str],
    load: float = 1.0,
    cost: Array | None = None,
    floor: Mapping[Column, int] | None = None,
) -> Joint:
    """The program of ``goal``; ``load`` and ``cost`` [S, J] are those of "gentle"."""
    s, j = np.nonzero(table.rates > 0)
    columns, arcs, types = len(table.columns), len(s), len(table.types)
    extra = 1 if goal == "headroom" else 0
    demand = table.demand
    scale = _scale(table) if goal == "headroom" else 1.0

    share = np.zeros((columns, columns + arcs + extra))
    share[s, columns + np.arange(arcs)] = demand[j] / table.rates[s, j]
    share[np.arange(columns), np.arange(columns)] = -load

    sums = np.zeros((types, columns + arcs + extra))
    sums[j, columns + np.arange(arcs)] = 1.0
    sums[:, columns + arcs :] = -scale
    least = np.zeros(types) if goal != "gentle" else np.ones(types)
    most = np.ones(types) if goal != "headroom" else np.zeros(types)
    least = np.full(types, -np.inf) if goal == "served" else least

    packing, room = _packing(table)
    owners = np.array([[float(c.model_id == m) for c in table.columns] for m in sorted(wanted)])
    counted = np.vstack([packing, owners.reshape(-1, columns)])
    counted = np.hstack([counted, np.zeros((len(counted), arcs + extra))])

    weight = demand[j] / demand.sum() if arcs else np.zeros(0)
    toll = {"headroom": np.zeros(arcs), "served": -weight}
    priced = toll[goal] if goal != "gentle" else weight * _given(cost)[s, j]
    replicas_max = [
        min((room[i] for i in range(len(room)) if packing[i, k] > 0), default=0.0) / c.shape.gpus
        for k, c in enumerate(table.columns)
    ]
    counts_max = [
        np.floor(most_ + ENOUGH) if plannable(c) else 0.0
        for c, most_ in zip(table.columns, replicas_max, strict=True)
    ]
    return Joint(
        goal=goal,
        cost=np.concatenate([np.zeros(columns), priced, -np.ones(extra)]),
        rows=np.vstack([share, sums, counted]),
        lower=np.concatenate(
            [np.full(columns, -np.inf), least, np.full(len(room), -np.inf), np.ones(len(wanted))]
        ),
        upper=np.concatenate([np.zeros(columns), most, room, np.full(len(wanted), np.inf)]),
        floor=np.concatenate([_floor(table, floor or {}), np.zeros(arcs + extra)]),
        ceiling=np.concatenate([counts_max, np.full(arcs + extra, np.inf)]),
        integrality=np.concatenate([np.ones(columns, np.int_), np.zeros(arcs + extra, np.int_)]),
        arcs=(s, j),
        scale=scale,
    )


def solve(program: Joint, *, time_limit_s: float) -> tuple[Array, float, bool] | None:
    """Variables, bound on the objective, and whether that is proven; None when nothing is
    feasible or nothing was found in time."""
    if not program.cost.size:
        return None
    found = milp(
        program.cost,
        integrality=program.integrality,
        bounds=Bounds(program.floor, program.ceiling),
        constraints=LinearConstraint(program.rows, program.lower, program.upper),
        options={"mip_rel_gap": GAP_MAX, "node_limit": NODES_MAX, "time_limit": time_limit_s},
    )
    if found.x is None:
        return None
    bound = found.mip_dual_bound
    return np.asarray(found.x, np.float64), float(found.fun if bound is None else bound), (
        found.status == 0
    )


def extract(
    table: Table, program: Joint, variables: Array, *, bound: float, optimal: bool
) -> Solution:
    """Counts as integers, shares [S, J], and the objective in the goal's terms."""
    columns = len(table.columns)
    s, j = program.arcs
    counts = np.rint(variables[:columns])
    shares = np.zeros_like(table.rates)
    shares[s, j] = np.maximum(variables[columns : columns + len(s)], 0.0)
    shares[counts == 0] = 0.0  # the solver's tolerance leaves crumbs
    unit = {"headroom": -program.scale, "gentle": 1.0, "served": -float(table.demand.sum())}
    return Solution(
        counts={column: int(y) for column, y in zip(table.columns, counts, strict=True) if y > 0},
        shares=shares,
        objective=unit[program.goal] * float(program.cost @ variables),
        bound=unit[program.goal] * bound,
        optimal=optimal,
    )


def best_joint(
    table: Table,
    goal: Goal,
    *,
    wanted: Collection[str],
    time_limit_s: float,
    load: float = 1.0,
    cost: Array | None = None,
    floor: Mapping[Column, int] | None = None,
) -> Solution | None:
    """Formulate, solve, extract and verify; None when there is no such plan."""
    program = formulate(table, goal, wanted=wanted, load=load, cost=cost, floor=floor)
    found = solve(program, time_limit_s=time_limit_s)
    if found is None:
        return None
    solution = extract(table, program, found[0], bound=found[1], optimal=found[2])
    wrong = verify(table, solution.counts, wanted=wanted)
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


def _floor(table: Table, given: Mapping[Column, int]) -> Array:
    return np.array([float(given.get(column, 0)) for column in table.columns])


def _given(cost: Array | None) -> Array:
    assert cost is not None, "gentle needs a cost for each column and type"
    return cost
