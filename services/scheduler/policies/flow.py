"""Which share of each request type goes to which replicas, and how far that carries: fluid flow.

Rows k are replicas, or groups of identical ones; columns j are request types, those of all models
side by side. A row that cannot serve a type has rate 0 there.

    n[k, j]   requests/s of one replica of row k that saw type j alone
    e[k, j]   most requests/s of type j that one replica of row k may be given (infinite: no bound)
    y[k]      replicas in row k
    d[j]      arrivals of type j, requests/s
    x[k, j]   the flow: requests/s of type j to row k

    share     sum_j x[k, j] / n[k, j] <= y[k]     a replica's time is shared out among its types
    ceiling   x[k, j] <= e[k, j] * y[k]

Three objectives, each a linear program solved exactly by HiGHS:

    served    max sum_kj x[k, j]       with  sum_k x[k, j] <= d[j]
    headroom  max t                    with  sum_k x[k, j] = t * d[j]
    lean      min sum_kj x[k, j] / n[k, j]  with  sum_k x[k, j] = d[j], load * y[k] for y[k] in
              ``share``, and where load > 1 also in ``ceiling``

The first is the lower level of OServe (arXiv 2602.12151): a maximum flow with gains, source to
types to replicas to sink, where a request of type j takes 1 / n[k, j] of replica k. It has many
optima when less arrives than could be served, and cannot tell a deployment that is nearly full from
one that idles; the second can: t is how many times the demand would fit, 1 / t the load of the
fullest replica. The third picks, among dispatches that load no replica above ``load``, the one
that takes the least of the replicas' time.

What one more replica of row k would bring follows from the dual of the first two, without ceilings:

    min sum_k pi[k] y[k] + sum_j mu[j]      with  pi[k] d[j] / n[k, j] >= w[j]     every k and j
    headroom   sum_j w[j] = 1, mu = 0;   served   w[j] = d[j] - mu[j], mu >= 0

so that at the optimum pi[k] = max_j w[j] n[k, j] / d[j], also for rows without a replica. The
optimum is concave in y: one more replica of row k brings pi[k] at most, and what the replicas of a
row carry together is pi[k] y[k].
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeResult, linprog

Array = npt.NDArray[np.float64]
Objective = Literal["served", "headroom", "lean"]

TOLERANCE = 1e-6  # relative, of the solver's primal feasibility and of ``verify``


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One deployment under one demand; shapes ``rates`` and ``ceilings`` [K, J], ``copies`` [K],
    ``demand`` [J]. Every demand is above zero."""

    rates: Array
    ceilings: Array
    copies: Array
    demand: Array


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """min cost @ v with upper @ v <= upper_bounds, equal @ v = equal_bounds, 0 <= v <= ceilings.

    Variables are the shares z = x / d of the arcs in ``arcs`` (k and j where n > 0) and, for
    "headroom", t; both divided by ``scale``, so that all numbers are of the order of 1.
    """

    objective: Objective
    cost: Array
    upper: Array
    upper_bounds: Array
    equal: Array
    equal_bounds: Array
    ceilings: Array
    arcs: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """``sent`` [K, J] requests/s; ``served`` is their sum, of the demand or of ``headroom`` times
    the demand; ``loads`` [K]: the share of each row's time that is used."""

    sent: Array
    served: float
    headroom: float
    loads: Array

    def shares(self) -> Array:
        """[K, J]: of each type, the share that each row gets; columns that are served sum to 1."""
        totals = self.sent.sum(axis=0)
        return np.divide(self.sent, totals, out=np.zeros_like(self.sent), where=totals > 0)


@dataclass(frozen=True, slots=True, eq=False)
class Duals:
    """``optimum`` in multiples of the demand (headroom) or requests/s (served). ``replica`` [K]:
    one more replica of the row brings at most so much more of it. ``types`` [J]: w; for headroom
    each type's share of what the replicas are worth."""

    optimum: float
    replica: Array
    types: Array


def formulate(instance: Instance, objective: Objective, *, load: float = 1.0) -> Program:
    """The program of ``objective``; ``load`` is that of "lean"."""
    n, e, y, d = instance.rates, instance.ceilings, instance.copies, instance.demand
    k, j = np.nonzero((n > 0) & (y[:, None] > 0) & (e > 0))
    arcs = len(k)
    extra = 1 if objective == "headroom" else 0
    scale = _headroom_bound(instance) if extra else 1.0
    time = scale * d[j] / n[k, j]
    if objective == "lean":
        time = time / load
    share = np.zeros((len(y), arcs + extra))
    share[k, np.arange(arcs)] = time
    sums = np.zeros((len(d), arcs + extra))
    sums[j, np.arange(arcs)] = 1.0
    sums[:, arcs:] = -1.0
    ceilings = np.append(e[k, j] * y[k] / (scale * d[j]), [np.inf] * extra)
    none: Array = np.zeros((0, arcs + extra))
    empty: Array = np.zeros(0)
    ones: Array = np.ones_like(d)
    if objective == "served":
        upper, bounds = np.vstack([share, sums]), np.concatenate([y, ones])
        return Program(objective, -d[j], upper, bounds, none, empty, ceilings, (k, j))
    if objective == "lean":
        ceilings = ceilings * max(1.0, load)
        return Program(objective, time, share, y, sums, ones, ceilings, (k, j))
    cost = np.zeros(arcs + 1)
    cost[-1] = -1.0
    zeros = np.zeros_like(d)
    return Program(objective, cost, share, y, sums, zeros, ceilings, (k, j), scale)


def solve(program: Program) -> Array | None:
    """The variables at the optimum; None when there is no feasible point."""
    if not program.cost.size:
        return np.zeros(0) if not np.any(program.equal_bounds) else None
    found = _solved(program)
    return np.asarray(found.x, dtype=np.float64) if found.status == 0 else None


def _solved(program: Program) -> OptimizeResult:
    return linprog(
        program.cost,
        A_ub=program.upper,
        b_ub=program.upper_bounds,
        A_eq=program.equal,
        b_eq=program.equal_bounds,
        bounds=[(0.0, float(ceiling)) for ceiling in program.ceilings],
        method="highs",
    )


def duals(instance: Instance, objective: Literal["headroom", "served"]) -> Duals:
    """What the optimum hangs on. ``instance`` has no ceilings."""
    assert np.all(np.isinf(instance.ceilings)), "the dual knows no ceilings"
    program = formulate(instance, objective)
    d, types = instance.demand, len(instance.demand)
    optimum, worth = 0.0, d if objective == "served" else np.full(types, 1.0 / max(1, types))
    if program.arcs[0].size:
        found = _solved(program)
        assert found.status == 0, "no flow at all is a flow"
        optimum = -float(found.fun) * program.scale
        if objective == "served":
            worth = d + np.asarray(found.ineqlin.marginals, np.float64)[-types:]
        else:
            worth = np.abs(np.asarray(found.eqlin.marginals, np.float64))
            worth = worth / worth.sum()
    replica = (np.maximum(worth, 0.0) / d * instance.rates).max(axis=1, initial=0.0)
    return Duals(optimum, replica, worth)


def extract(instance: Instance, program: Program, variables: Array) -> Flow:
    """The flow of a solution. The headroom of "served" and "lean" is what their flow covers of
    the demand of the worst-off type."""
    k, j = program.arcs
    sent = np.zeros_like(instance.rates)
    sent[k, j] = np.maximum(variables[: len(k)], 0.0) * program.scale * instance.demand[j]
    return measured(instance, sent)


def measured(instance: Instance, sent: Array) -> Flow:
    """``sent`` with what follows from it."""
    time = np.divide(sent, instance.rates, out=np.zeros_like(sent), where=instance.rates > 0)
    used = time.sum(axis=1)
    loads = np.divide(used, instance.copies, out=np.zeros_like(used), where=instance.copies > 0)
    covered = sent.sum(axis=0) / instance.demand
    headroom = float(covered.min()) if covered.size else 0.0
    return Flow(sent, float(sent.sum()), headroom, loads)


def best_flow(instance: Instance, objective: Objective, *, load: float = 1.0) -> Flow | None:
    """Formulate, solve, extract and verify; None when "lean" has no feasible point."""
    program = formulate(instance, objective, load=load)
    variables = solve(program)
    if variables is None:
        return None
    flow = extract(instance, program, variables)
    served_max = np.inf if objective == "headroom" else 1.0
    wrong = verify(instance, flow, served_max=served_max, load=load if objective == "lean" else 1.0)
    assert not wrong, wrong
    return flow


def verify(
    instance: Instance, flow: Flow, *, served_max: float = np.inf, load: float = 1.0
) -> list[str]:
    """What is wrong with ``flow``, worked out from its requests/s alone; empty when nothing is.
    ``served_max``: the largest multiple of a type's demand that may be served; ``load``: the
    largest of a row."""
    wrong: list[str] = []
    for k, row in enumerate(flow.sent):
        used = 0.0
        for j, sent in enumerate(row):
            rate, copies = instance.rates[k, j], instance.copies[k]
            ceiling = instance.ceilings[k, j] * copies * max(1.0, load) if copies > 0 else 0.0
            if sent < 0.0 or sent > ceiling * (1 + TOLERANCE) + TOLERANCE:
                wrong.append(f"row {k} gets {sent:g} of type {j}, not 0 to {ceiling:g}")
            if sent > 0.0:
                used += sent / rate if rate > 0 else np.inf
        if used > load * instance.copies[k] * (1 + TOLERANCE) + TOLERANCE:
            wrong.append(f"row {k} is used {used:g} times of {load * instance.copies[k]:g}")
    for j, demand in enumerate(instance.demand):
        total = float(flow.sent[:, j].sum())
        if total > served_max * demand * (1 + TOLERANCE):
            wrong.append(f"type {j} is served {total:g} of {demand:g}")
    return wrong


def _headroom_bound(instance: Instance) -> float:
    """No headroom exceeds that of the type which would have every replica to itself."""
    alone = (instance.rates * instance.copies[:, None]).sum(axis=0)
    ratio = alone / instance.demand
    bound = float(ratio.min()) if ratio.size else 0.0
    return bound if bound > 0 else 1.0
