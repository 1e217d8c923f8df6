"""Columns that no best plan needs: they are left out of the program, which loses nothing.

Column a is dominated by column b of the same model and pool if, with k = floor(g[a] / g[b]) >= 1,

    b[b] <= b[a]                     b shares a node in no larger a piece
    k n[b, j] >= n[a, j]             every type j
    cost[b, j] <= cost[a, j]         every type j that a can serve, where costs count ("gentle")

Then k replicas of b in the place of each of a make no plan worse, in any of its terms:

- packing: a row of size c <= b[b] has k g[b] <= g[a] in the place of g[a]; one of b[b] < c <= b[a]
  loses g[a]; the others have neither;
- flow: what one of a does, the k do among them: a k-th of each type's requests takes each of them
  sum_j x[j] / (k n[b, j]) <= sum_j x[j] / n[a, j] of its time;
- models: k >= 1 replicas of the same model are at least as many;
- survive: the loss of one of the k leaves at least what the loss of the whole of a left, and the
  loss of any other replica leaves all k;
- price: k g[b] <= g[a] GPUs of the same kind.

The relation is transitive (floors of quotients only grow when they are taken at once), so what is
left dominates all that is dropped; of columns that dominate each other the first one is left. A
column that is given (``floor``) is never dropped. Columns of several pools are not compared: each
has its own GPUs.
"""

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.joint_terms import Goal, Terms, plannable


def dominated(table: Table, goal: Goal, terms: Terms) -> npt.NDArray[np.bool_]:
    """[S]: which columns may be left out."""
    groups: dict[tuple[str, str], list[int]] = {}
    for s, column in enumerate(table.columns):
        if plannable(column):
            groups.setdefault((column.model_id, column.pool), []).append(s)
    out = np.zeros(len(table.columns), np.bool_)
    for group in groups.values():
        over = {(a, b) for a in group for b in group if _over(table, goal, terms, a, b)}
        for a, b in over:
            if not terms.floor.get(table.columns[a], 0) and ((b, a) not in over or b < a):
                out[a] = True
    return out


def _over(table: Table, goal: Goal, terms: Terms, a: int, b: int) -> bool:
    """Whether column ``b`` dominates column ``a``."""
    if a == b:
        return False
    times = table.columns[a].shape.gpus // table.columns[b].shape.gpus
    if times < 1 or _piece(table, table.columns[b]) > _piece(table, table.columns[a]):
        return False
    if np.any(times * table.rates[b] < table.rates[a]):
        return False
    if goal != "gentle":
        return True
    assert terms.cost is not None, "gentle needs a cost for each column and type"
    does = table.rates[a] > 0
    return bool(np.all(terms.cost[b, does] <= terms.cost[a, does]))


def _piece(table: Table, column: Column) -> int:
    """GPUs of one node that a replica needs."""
    return table.pools[column.pool].unit(column.shape)[0]
