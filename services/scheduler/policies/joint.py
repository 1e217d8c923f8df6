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
taken, with its gap, and if there is none the relaxation's, rounded (``joint_fallback``).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array, best_flow
from services.scheduler.policies.joint_fallback import enough, filled
from services.scheduler.policies.joint_rows import ROUNDING, Joint, formulate
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
ROUNDS_MAX = 6  # of adding scenarios; the last one has them all
INFEASIBLE = 2  # HiGHS's, by scipy


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Found:
    """``counts`` [S]: the best plan found, None when none was in time; ``bound`` on the objective,
    in the goal's terms, infinite when there is none."""

    counts: Array | None
    value: float
    bound: float


def best_joint(
    table: Table, goal: Goal, terms: Terms, *, time_limit_s: float, nodes_max: int = NODES_MAX
) -> Solution | None:
    """The best plan for ``goal``, verified; None when there is none: no column, nothing to carry
    (but for "thrift"), or terms that no plan keeps."""
    assert not (terms.survive and goal == "served"), "what is served is not all that is asked for"
    if not table.columns or (not table.types and goal != "thrift"):
        return None
    rounds = ROUNDS_MAX if terms.survive else 1
    best: Solution | None = None
    bound = np.inf if goal in GREATEST else -np.inf
    scenarios: list[Column] = []
    for number in range(1, rounds + 1):
        program = formulate(table, goal, terms, scenarios=scenarios)
        found = solve(program, time_limit_s=time_limit_s / rounds, nodes_max=nodes_max)
        if found is None:
            return None
        bound = min(bound, found.bound) if goal in GREATEST else max(bound, found.bound)
        if found.variables is None:
            break
        counts = counts_of(table, found.variables)
        left = losses(table, counts) if terms.survive else {}
        solution = extract(table, goal, terms, counts, left=left, bound=bound)
        best = _better(best, solution)
        needs = found.value if goal == "headroom" else 1.0 / terms.load_after_loss()
        fails = [column for column, share in left.items() if share < needs * (1 - TOLERANCE)]
        fails = [column for column in fails if column not in scenarios]
        if not fails or (best is not None and replace(best, bound=bound).optimal):
            break
        scenarios += fails if number < rounds - 1 else _others(program, table, scenarios)
    else:
        ...
