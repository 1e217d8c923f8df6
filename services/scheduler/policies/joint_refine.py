"""Small steps from a good plan to a less late one: what linear programs cannot see.

The candidates of ``joint_choice`` come from programs in which each type has a shape to itself. But
types that share a replica wait for each other, and a shape may be best for a mix and for none of
its types. So the plan chosen is compared with its neighbours as they would really be dispatched,
and left for the least late of them as long as that gains anything worth while.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.joint import Terms, losses, plannable, verify
from services.scheduler.policies.joint_choice import Candidate, Judge

STEPS_MAX = 8
PLANS_MAX = 400  # judged in all: some 5 ms each
GAIN_MIN = 0.02  # relative; smaller steps are not worth their time


def refine(judge: Judge, start: Candidate, terms: Terms) -> Candidate:
    """``start``, or what at most ``STEPS_MAX`` steps over ``PLANS_MAX`` plans lead to; all of them
    keep ``terms`` if it does."""
    best = start
    seen = {_key(start.counts)}
    for _ in range(STEPS_MAX):
        step = best
        for counts in neighbours(judge.table, best.counts):
            if _key(counts) in seen or len(seen) > PLANS_MAX:
                continue
            seen.add(_key(counts))
            if not keeps(judge.table, counts, terms):
                continue
            step = min(step, judge.dispatched(counts), key=lambda candidate: candidate.lateness)
        if step.lateness > best.lateness * (1 - GAIN_MIN):
            return best
        best = step
    return best


def keeps(table: Table, counts: Mapping[Column, int], terms: Terms) -> bool:
    """Whether models have the replicas asked for, and any may be lost."""
    own = Counter[str]()
    for column, count in counts.items():
        own[column.model_id] += count
    if any(own[model_id] < least for model_id, least in terms.replicas_min().items()):
        return False
    return not terms.survive or all(share >= 1.0 for share in losses(table, counts).values())


def neighbours(table: Table, counts: Mapping[Column, int]) -> Iterator[Counter[Column]]:
    """Plans in which replicas of one column became others on as many GPUs: one of the same size,
    two of half of it, or half as many of twice; all replicas of the column at once; or one replica
    that another model has instead."""
    for old, count in sorted(counts.items()):
        for new in table.columns:
            if new == old or new.pool != old.pool or not plannable(new):
                continue
            for gone, come in _exchanges(old, new, count):
                attempt = Counter(counts)
                attempt[old] -= gone
                attempt[new] += come
                if not verify(table, +attempt, wanted={column.model_id for column in counts}):
                    yield +attempt


def _exchanges(old: Column, new: Column, count: int) -> list[tuple[int, int]]:
    """(replicas of ``old`` that go, replicas of ``new`` that come), each once."""
    old_gpus, new_gpus = old.shape.gpus, new.shape.gpus
    found: list[tuple[int, int]] = []
    if old_gpus == new_gpus:
        found.append((1, 1))
    if old.model_id == new.model_id:
        if old_gpus == 2 * new_gpus:
            found.append((1, 2))
        if 2 * old_gpus == new_gpus and count > 1:
            found.append((2, 1))
        found.append((count, count * old_gpus // new_gpus))
    return [pair for pair in dict.fromkeys(found) if pair[1] > 0]


def _key(counts: Mapping[Column, int]) -> tuple[tuple[Column, int], ...]:
    return tuple(sorted(counts.items()))
