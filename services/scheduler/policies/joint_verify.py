"""Whether a joint plan holds what it says, worked out without the program's rows.

Replicas are put on nodes one by one, loads are added up from shares, and every single loss is
tried: a replica is taken away, and the flow of the rest solved anew.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.joint_terms import GREATEST, Solution, Terms, plannable

TOLERANCE = 1e-5  # relative: some times that of the solver


def verify(table: Table, counts: Mapping[Column, int], *, wanted: Collection[str]) -> list[str]:
    """What is wrong with ``counts``: a model of ``wanted`` has none, or they do not fit the nodes,
    the largest first. The flow has a check of its own (``flow.verify``)."""
    return _too_few(counts, dict.fromkeys(wanted, 1)) + _misfits(table, counts)


def verify_solution(table: Table, terms: Terms, solution: Solution) -> list[str]:
    """What is wrong with ``solution``; empty when nothing is. Solves a flow for each column in use
    if it is to survive a loss."""
    counts = solution.counts
    wrong = [
        f"{count} x {column} is no number of replicas"
        for column, count in counts.items()
        if count < 1 or column not in table.columns
    ]
    if wrong:
        return wrong
    wrong += [
        f"{column} is never planned"
        for column, count in counts.items()
        if not plannable(column) and count > terms.floor.get(column, 0)
    ]
    wrong += [
        f"{counts.get(column, 0)} x {column}, though {given} are given"
        for column, given in terms.floor.items()
        if counts.get(column, 0) < given
    ]
    wrong += _too_few(counts, terms.replicas_min()) + _misfits(table, counts)
    return wrong + _wrong_shares(table, terms, solution) + _wrong_objective(table, terms, solution)


def losses(table: Table, counts: Mapping[Column, int]) -> dict[Column, float]:
    """How many times the demand of its own model the rest carries when one replica of a column in
    use is lost. The other models lose nothing; of models without demand nothing is said."""
    found: dict[Column, float] = {}
    for model_id in sorted({column.model_id for column in counts}):
        types = [j for j, kind in enumerate(table.types) if kind.model_id == model_id]
        own = Counter({c: n for c, n in counts.items() if c.model_id == model_id and n > 0})
        part = table.only(types)
        for column in sorted(own) if types else ():
            flow = best_flow(part.instance(own - Counter({column: 1})), "headroom")
            assert flow is not None, "no flow at all is a flow"
            found[column] = flow.headroom
    return found


def _too_few(counts: Mapping[Column, int], least: Mapping[str, int]) -> list[str]:
    have: Counter[str] = Counter()
    for column, count in counts.items():
        have[column.model_id] += count
    return [
        f"{model_id} has {have[model_id] or 'no'} replica{'s' if have[model_id] > 1 else ''}"
        + (f" of {count}" if count > 1 else "")
        for model_id, count in least.items()
        if have[model_id] < count
    ]


def _misfits(table: Table, counts: Mapping[Column, int]) -> list[str]:
    """Replicas for which no node has GPUs left."""
    wrong: list[str] = []
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


def _wrong_shares(table: Table, terms: Terms, solution: Solution) -> list[str]:
    wrong: list[str] = []
    goal, shares = solution.goal, solution.shares
    load = terms.load if goal in {"gentle", "thrift"} else 1.0
    for s, column in enumerate(table.columns):
        used = 0.0
        for j, share in enumerate(shares[s]):
            if share < 0.0 or (share > 0.0 and not table.rates[s, j] > 0.0):
                wrong.append(f"{column} gets {share:g} of type {j}, which it cannot serve")
            elif share > 0.0:
                used += float(share) * table.types[j].arrivals_rps / float(table.rates[s, j])
        have = load * solution.counts.get(column, 0)
        if used > have * (1 + TOLERANCE):
            wrong.append(f"{column} is used {used:g} times of {have:g}")
    sums = shares.sum(axis=0)
    most = max(1.0, solution.objective) if goal == "headroom" else 1.0
    aim = {"headroom": solution.objective, "served": None}.get(goal, 1.0)
    for j, total in enumerate(sums):
        if aim is not None and abs(total - aim) > TOLERANCE * max(aim, TOLERANCE):
            wrong.append(f"shares of type {j} sum to {total:g}, not to {aim:g}")
        if total > most * (1 + TOLERANCE):
            wrong.append(f"type {j} is served {total:g} times")
    return wrong


def _wrong_objective(table: Table, terms: Terms, solution: Solution) -> list[str]:
    """Its value, its bound, and what is left of it after a loss."""
    wrong: list[str] = []
    goal, objective = solution.goal, solution.objective
    counts = [solution.counts.get(column, 0) for column in table.columns]
    arrivals = solution.shares * table.demand
    found = objective
    if goal == "served":
        found = float(arrivals.sum())
    elif goal == "thrift":
        found = float(terms.hourly(table) @ np.array(counts))
    elif goal == "gentle":
        assert terms.cost is not None, "gentle needs a cost for each column and type"
        found = float((arrivals * terms.cost).sum() / table.demand.sum())
    if abs(found - objective) > TOLERANCE * abs(objective):
        wrong.append(f"the objective is {found:g}, not {objective:g}")
    beyond = (objective - solution.bound) * (1 if goal in GREATEST else -1)
    if beyond > TOLERANCE * abs(objective):
        wrong.append(f"an objective of {objective:g} is better than its bound {solution.bound:g}")
    if terms.survive:
        needs = objective if goal == "headroom" else 1.0 / terms.load_after_loss()
        wrong += [
            f"without one {column} the rest carries {left:g} times the demand, not {needs:g}"
            for column, left in losses(table, solution.counts).items()
            if left < needs * (1 - TOLERANCE)
        ]
    return wrong
