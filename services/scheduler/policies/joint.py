"""How many replicas of each shape, and which share of each type goes to each shape: one program.

OServe (arXiv 2602.12151) searches shapes and solves a flow for each. Identical replicas are
interchangeable, so a count of each is enough, and both questions are one small mixed-integer
program, as in Demystifying Cost-Efficiency (arXiv 2502.00722) with shapes in place of GPU types.
Its rows are in ``joint_rows``; it is solved to a proven gap by HiGHS.

A plan that is to survive a loss has a scenario for each column that it uses. Few of them matter, so
they are added as they are needed: the program is solved without, every single loss of its plan is
tried, and the scenarios that fail are added before it is solved again. Each program has fewer rows
than the whole, so its bound is one for the whole; a plan whose losses all hold is then optimal. The
last round has every scenario, so that it ends.

Counts decide: shares, objective and what is left after a loss are worked out anew from them
(``extract``), free of the solver's tolerance. When its time is up the best plan found so far is
taken, with its gap, or the relaxation's, rounded, where that is better or there is no other
(``joint_fallback``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from services.scheduler.policies import flow as flows
from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import TOLERANCE, Array, Instance, best_flow
from services.scheduler.policies.joint_fallback import enough, filled
from services.scheduler.policies.joint_rows import Joint, formulate
from services.scheduler.policies.joint_terms import (
    GAP_MAX,
    GREATEST,
    Goal,
    Solution,
    Terms,
    plannable,
)
from services.scheduler.policies.joint_verify import losses, verify, verify_solution

__all__ = [
    "GAP_MAX", "Goal", "Solution", "Terms", "best_joint", "extract", "formulate", "plannable",
    "solve", "verify", "verify_solution",
]  # fmt: skip

NODES_MAX = 20_000  # of the search tree: a bound that does not depend on the machine's speed
SOLVER_GAP = 0.9 * GAP_MAX  # what the solver is asked for: rounding may cost the rest
ROUNDS_MAX = 4  # of adding scenarios, mostly two or three; the last one has them all
RELAXED_S_MAX = 1.0  # for the linear relaxation alone, after the time was up
SOLVED, INFEASIBLE = 0, 2  # statuses of scipy's milp


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Found:
    """``variables`` of the best plan found, None when none was found in time, and their ``value``;
    ``bound`` on any plan's, infinite when none is known. Both in the goal's terms."""

    variables: Array | None
    value: float
    bound: float


def best_joint(
    table: Table, goal: Goal, terms: Terms, *, time_limit_s: float, nodes_max: int = NODES_MAX
) -> Solution | None:
    """The best plan for ``goal``, verified, or the best that was found in ``time_limit_s`` and in
    ``nodes_max`` nodes of a search tree. None when there is none: no column, nothing expected
    (unless for "thrift"), terms that no plan keeps; or when time was up and rounding found none."""
    assert not (terms.survive and goal == "served"), "to survive is to carry all of the demand"
    if not table.columns or (not table.types and goal != "thrift"):
        return None
    rounds = ROUNDS_MAX if terms.survive else 1
    best: Solution | None = None
    program, bounds = formulate(table, goal, terms), [_unbounded(goal)]
    scenarios: list[Column] = []
    for number in range(1, rounds + 1):
        found = solve(program, time_limit_s=time_limit_s / rounds, nodes_max=nodes_max)
        if found is None:
            return None
        bounds.append(found.bound)
        solution, fails = _tried(table, goal, terms, found)
        best = _better(best, solution, bounds)
        fails = [lost for lost in fails if lost not in scenarios]
        if not fails or (best is not None and best.optimal):
            break
        if number == rounds - 1:
            fails = [lost for lost in table.columns if lost not in scenarios]
        scenarios += fails
        program = formulate(table, goal, terms, scenarios=scenarios)
    if best is None or not best.optimal:
        best = _better(best, _rounded(table, goal, terms, program, bounds), bounds)
    if best is not None:
        wrong = verify_solution(table, terms, best)
        assert not wrong, wrong
    return best


def solve(program: Joint, *, time_limit_s: float, nodes_max: int = NODES_MAX) -> Found | None:
    """The best that is found within the limits; None when nothing is feasible."""
    found = milp(
        program.cost,
        integrality=program.integrality,
        bounds=Bounds(program.floor, program.ceiling),
        constraints=LinearConstraint(program.rows, program.lower, program.upper),
        options={"mip_rel_gap": SOLVER_GAP, "node_limit": nodes_max, "time_limit": time_limit_s},
    )
    if found.status == INFEASIBLE:
        return None
    bound = found.fun if found.status == SOLVED else -np.inf
    if found.mip_dual_bound is not None:  # it is None of programs without whole numbers
        bound = found.mip_dual_bound
    if found.x is None:
        return Found(variables=None, value=np.nan, bound=program.unit * float(bound))
    variables = np.asarray(found.x, np.float64)
    value = float(program.cost @ variables)
    return Found(variables=variables, value=program.unit * value, bound=program.unit * float(bound))


def extract(
    table: Table,
    goal: Goal,
    terms: Terms,
    counts: Mapping[Column, int],
    *,
    left: Mapping[Column, float],
) -> Solution | None:
    """Shares [S, J] and objective of ``counts``, worked out from them alone; None when they do not
    carry what ``goal`` asks for. ``left``: their ``losses``, if one is to be survived. Nothing is
    said of a bound."""
    if goal in {"gentle", "thrift"} and not enough(table, terms, counts, left):
        return None
    bound, instance = _unbounded(goal), table.instance(counts)
    if not table.types:
        shares, objective = np.zeros_like(table.rates), 0.0
    elif goal == "gentle":
        found = _gentlest(instance, terms)
        if found is None:
            return None
        shares, objective = found
    else:
        flow = best_flow(instance, "served" if goal == "served" else "headroom")
        assert flow is not None, "no flow at all is a flow"
        objective = flow.served if goal == "served" else min([flow.headroom, *left.values()])
        shares = flow.sent / table.demand
        if goal != "served" and flow.headroom > 0.0:
            shares = flow.shares() * (objective if goal == "headroom" else 1.0)
    if goal == "thrift":
        objective = float(terms.hourly(table) @ instance.copies)
    return Solution(goal=goal, counts=counts, shares=shares, objective=objective, bound=bound)


def _tried(
    table: Table, goal: Goal, terms: Terms, found: Found
) -> tuple[Solution | None, list[Column]]:
    """What was found, and the columns of which it cannot lose a replica as the program thinks."""
    if found.variables is None:
        return None, []
    counts = _counts(table, found.variables)
    left = losses(table, counts) if terms.survive else {}
    needs = found.value if goal == "headroom" else 1.0 / terms.load_after_loss()
    fails = [lost for lost, share in left.items() if share < needs * (1 - TOLERANCE)]
    return extract(table, goal, terms, counts, left=left), fails


def _rounded(
    table: Table, goal: Goal, terms: Terms, program: Joint, bounds: list[float]
) -> Solution | None:
    """A plan near the linear relaxation of ``program``, whose bound is added to ``bounds``."""
    relaxed = solve(
        replace(program, integrality=np.zeros_like(program.integrality)),
        time_limit_s=RELAXED_S_MAX,
    )
    if relaxed is None:
        return None
    bounds.append(relaxed.bound)
    start = np.zeros(len(table.columns))
    if relaxed.variables is not None:
        start = relaxed.variables[: len(start)]
    counts = filled(table, goal, terms, start)
    if counts is None:
        return None
    return extract(table, goal, terms, counts, left=losses(table, counts) if terms.survive else {})


def _better(
    best: Solution | None, other: Solution | None, bounds: Sequence[float]
) -> Solution | None:
    """The better of two plans, with the tightest of the ``bounds``, none of which it can beat but
    by rounding."""
    found = [solution for solution in (best, other) if solution is not None]
    if not found:
        return None
    if found[0].goal in GREATEST:
        first = max(found, key=lambda solution: solution.objective)
        return replace(first, bound=max(first.objective, min(bounds)))
    first = min(found, key=lambda solution: solution.objective)
    return replace(first, bound=min(first.objective, max(bounds)))


def _unbounded(goal: Goal) -> float:
    return np.inf if goal in GREATEST else -np.inf


def _counts(table: Table, variables: Array) -> dict[Column, int]:
    whole = np.rint(variables[: len(table.columns)])
    return {column: int(y) for column, y in zip(table.columns, whole, strict=True) if y > 0}


def _gentlest(instance: Instance, terms: Terms) -> tuple[Array, float] | None:
    """Shares of least cost that load no replica above ``terms.load``, and that cost."""
    assert terms.cost is not None, "gentle needs a cost for each column and type"
    load = terms.load * (1 + TOLERANCE)
    program = flows.formulate(instance, "lean", load=load)
    weight = instance.demand / instance.demand.sum()
    k, j = program.arcs
    variables = flows.solve(replace(program, cost=weight[j] * terms.cost[k, j]))
    if variables is None:
        return None
    shares = flows.extract(instance, program, variables).shares()
    return shares, float((weight * terms.cost * shares).sum())
