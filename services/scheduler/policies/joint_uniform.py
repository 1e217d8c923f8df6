"""Uniform plans: all replicas of a model on a pool have one shape, the same GPUs as before.

They are what an operator would choose among, so that no plan may lose to the best of them. Each
model on each pool is gone through in turn, whatever else there is being left as it is; the least
late of its shapes stays while the next one is gone through, so that the last plans are uniform
everywhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.joint import Terms, plannable, verify
from services.scheduler.policies.joint_fallback import enough
from services.scheduler.policies.joint_verify import losses

Counts = Mapping[Column, int]


def uniform_plans(
    table: Table, counts: Counts, terms: Terms, late: Callable[[Counts], float]
) -> Iterator[Counter[Column]]:
    """Those that keep to ``terms``, made from ``counts``; ``late`` compares them."""
    current = Counter(counts)
    groups = sorted({(column.pool, column.model_id) for column in counts})
    for k, group in enumerate(groups):
        options = list(_options(table, current, terms, group))
        yield from options
        if options and k + 1 < len(groups):
            current = min(options, key=late)


def lean_plans(
    table: Table, counts: Counts, terms: Terms, late: Callable[[Counts], float]
) -> Iterator[Counter[Column]]:
    """The same with no more replicas of each shape than carry the demand."""
    for plan in uniform_plans(table, counts, terms, late):
        for column in sorted(plan.keys() - counts.keys()):
            yield _shrunk(table, plan, terms, column)


def _options(
    table: Table, counts: Counter[Column], terms: Terms, group: tuple[str, str]
) -> Iterator[Counter[Column]]:
    """``counts`` with the replicas of one model on one pool in one shape, each that there is."""
    pool, _ = group
    others = Counter({c: n for c, n in counts.items() if (c.pool, c.model_id) != group and n > 0})
    if any(column.pool == pool for column in others):
        gpus = sum(n * c.shape.gpus for c, n in counts.items() if (c.pool, c.model_id) == group)
    else:  # all of the pool's
        gpus = sum(table.pools[pool].node_gpus)
    for column in table.columns:
        if (column.pool, column.model_id) != group or not plannable(column):
            continue
        for count in range(gpus // column.shape.gpus, 0, -1):
            plan = others + Counter({column: count})
            if not verify(table, plan, wanted=()):
                if _keeps(table, plan, terms):
                    yield plan
                break


def _keeps(table: Table, counts: Counter[Column], terms: Terms) -> bool:
    """Whether ``counts`` keep to ``terms``; that they fit the nodes is known."""
    have: Counter[str] = Counter()
    for column, count in counts.items():
        have[column.model_id] += count
    if any(have[model_id] < least for model_id, least in terms.replicas_min().items()):
        return False
    return not terms.survive or min(losses(table, counts).values(), default=1.0) >= 1.0


def _shrunk(table: Table, counts: Counter[Column], terms: Terms, column: Column) -> Counter[Column]:
    """``counts`` with the fewest replicas of ``column`` with which they carry the demand."""

    def with_count(count: int) -> Counter[Column]:
        return counts - Counter({column: counts[column] - count})

    low, high = 1, counts[column]
    while low < high:
        middle = (low + high) // 2
        plan = with_count(middle)
        left = losses(table, plan) if terms.survive else {}
        if enough(table, terms, plan, left) and _keeps(table, plan, terms):
            high = middle
        else:
            low = middle + 1
    return with_count(high)
