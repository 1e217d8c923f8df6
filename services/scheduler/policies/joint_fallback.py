"""A plan when the solver's time is up and it has none: the relaxation rounded down, then filled.

Counts of the linear relaxation, rounded down, fit their nodes: all packing rows are upper bounds.
What they leave free is given, one replica at a time, to the column that fits and whose dual price
per GPU (per price, for "thrift") is highest, until nothing fits, or until enough is carried where
more of it is worth nothing ("gentle", "thrift").
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import TOLERANCE, Array, best_flow, duals
from services.scheduler.policies.joint_rows import ROUNDING, pack_rows
from services.scheduler.policies.joint_terms import Goal, Terms, plannable
from services.scheduler.policies.joint_verify import losses

STEPS_MAX = 256  # replicas that are added one by one: some 5 ms each


def filled(table: Table, goal: Goal, terms: Terms, relaxed: Array) -> Counter[Column] | None:
    """Counts on the way up from ``relaxed`` [S], which may be zeros; None when the models' least
    replicas, or what has to be carried, found no room that way."""
    start = np.floor(relaxed + ROUNDING)
    counts = Counter(
        {
            column: max(int(y), terms.floor.get(column, 0))
            for column, y in zip(table.columns, start, strict=True)
        }
    )
    room = _Room(table)
    for model_id, least in terms.replicas_min().items():
        while sum(n for column, n in counts.items() if column.model_id == model_id) < least:
            fitting = [c for c in room.fitting(counts) if c.model_id == model_id]
            if not fitting:
                return None
            counts[min(fitting, key=lambda column: (column.shape.gpus, column))] += 1
    every = goal in {"headroom", "served"}
    price = terms.hourly(table) if goal == "thrift" else _gpus(table)
    for _ in range(STEPS_MAX):
        left = losses(table, counts) if terms.survive else {}
        if not every and enough(table, terms, counts, left):
            return +counts
        gains = _gain_of(table, goal, counts, left)
        options = [
            (gains[s] / max(float(price[s]), ROUNDING), -s)
            for s, column in enumerate(table.columns)
            if gains[s] > 0.0 and room.fits(counts, column)
        ]
        if not options:
            break
        counts[table.columns[-max(options)[1]]] += 1
    return +counts if every else None


def enough(
    table: Table, terms: Terms, counts: Mapping[Column, int], left: Mapping[Column, float]
) -> bool:
    """Whether ``counts`` carry the demand under the load of ``terms``, and what is ``left`` after
    any loss carries it too."""
    if not table.types:
        return True
    flow = best_flow(table.instance(counts), "headroom")
    assert flow is not None, "no flow at all is a flow"
    after = min(left.values(), default=np.inf)
    least = min(flow.headroom * terms.load, after * terms.load_after_loss())
    return least >= 1.0 - TOLERANCE


def _gain_of(
    table: Table, goal: Goal, counts: Counter[Column], left: Mapping[Column, float]
) -> Array:
    """[S]: what one more replica would bring; after the worst of the losses, if there are any."""
    used = +counts
    if left:
        used = used - Counter({min(left, key=lambda column: (left[column], column)): 1})
    objective = "served" if goal == "served" else "headroom"
    return duals(table.instance(used), objective).replica


def _gpus(table: Table) -> Array:
    return np.array([float(column.shape.gpus) for column in table.columns])


class _Room:
    """What else fits beside some counts."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rows, self._room = pack_rows(table)

    def fits(self, counts: Mapping[Column, int], column: Column) -> bool:
        columns = self._table.columns
        if not plannable(column):
            return False
        more = [float(counts.get(each, 0) + (each == column)) for each in columns]
        return bool(np.all(self._rows @ np.array(more) <= self._room + ROUNDING))

    def fitting(self, counts: Mapping[Column, int]) -> list[Column]:
        return [column for column in self._table.columns if self.fits(counts, column)]
