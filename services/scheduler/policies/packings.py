"""Every way to fill a pool of GPUs with replicas, so that no further one finds room.

A way is a count for each column. Sizes of units (``Pool.unit``) are powers of two, and the largest
are placed first: they leave room in whole blocks of every smaller size. So units of at least c GPUs
fit if they take no more than the pool has in whole blocks of c (``Pool.room``), and a replica of
unit size c finds room if that holds for c and for all smaller sizes with it.

Columns are walked in falling unit size. All that matters of a beginning is how many GPUs it takes,
and which earlier column still finds room; of these the one with fewest GPUs says it for all: where
it finds no more room, none does. So the number of ways is a sum over few states, worked out from
the end, and a walk that follows only beginnings with any way to end lists each way once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.scheduler.policies.capacity import Column, Pool

NOBODY = 0
"""GPUs of the smallest earlier column that still finds room: none does."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Choose a count for column ``index``; or, with ``index`` None, leave a unit size: from here on
    the columns ``open_`` of that size (as GPUs of a replica) must find no room."""

    index: int | None
    gpus: int
    room: int
    count_max: int
    open_: tuple[int, ...] = ()


class Packings:
    """The ways to fill ``pool`` with ``columns``. ``count_max``: bounds of the columns that are
    worth no more than so many replicas; room for another one of these is no room."""

    def __init__(
        self, pool: Pool, columns: Sequence[Column], *, count_max: Sequence[int | None]
    ) -> None:
        self._columns = len(columns)
        self._steps = _steps(pool, columns, count_max)
        self._ways = self._worked_out(sum(pool.node_gpus))

    @property
    def total(self) -> int:
        """How many ways there are; at least 1."""
        return self._ways[0][0, NOBODY]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Counts in the order of the columns; first what has fewest of the large ones."""
        stack = [(0, 0, NOBODY, (0,) * self._columns)]
        while stack:
            at, used, waiting, counts = stack.pop()
            if at == len(self._steps):
                yield counts
                continue
            step = self._steps[at]
            if step.index is None:
                after = _waiting(step, used, waiting)
                if self._ways[at + 1].get((used, after)):
                    stack.append((at + 1, used, after, counts))
                continue
            for count in range(_most(step, used), -1, -1):
                then = used + count * step.gpus
                if self._ways[at + 1].get((then, waiting)):
                    chosen = (*counts[: step.index], count, *counts[step.index + 1 :])
                    stack.append((at + 1, then, waiting, chosen))

    def at(self, rank: int) -> tuple[int, ...]:
        """The way that comes after ``rank`` others, without walking through these."""
        used, waiting, counts = 0, NOBODY, [0] * self._columns
        for at, step in enumerate(self._steps):
            after = self._ways[at + 1]
            if step.index is None:
                waiting = _waiting(step, used, waiting)
                continue
            count = 0
            while rank >= (ways := after.get((used, waiting), 0)):
                rank -= ways
                used += step.gpus
                count += 1
            counts[step.index] = count
        return tuple(counts)

    def _worked_out(self, gpus: int) -> list[dict[tuple[int, int], int]]:
        """Of each step: ways to go on from it, by GPUs used and by who waits for room."""
        sizes = {NOBODY, *(size for step in self._steps for size in step.open_)}
        last = {(used, NOBODY): 1 for used in range(gpus + 1)}
        ways = [last]
        for step in reversed(self._steps):
            after, here = ways[-1], dict[tuple[int, int], int]()
            for waiting in sizes:
                for used in range(gpus, -1, -1):
                    if step.index is None:
                        count = after.get((used, _waiting(step, used, waiting)), 0)
                    else:
                        count = _count(step, used, waiting, after, here)
                    if count:
                        here[used, waiting] = count
            ways.append(here)
        return ways[::-1]


def _steps(
    pool: Pool, columns: Sequence[Column], count_max: Sequence[int | None]
) -> tuple[_Step, ...]:
    units = [pool.unit(column.shape)[0] for column in columns]
    steps: list[_Step] = []
    for size in sorted(set(units), reverse=True):
        own = [i for i, unit in enumerate(units) if unit == size]
        room = pool.room(size)
        for i in own:
            gpus, bound = columns[i].shape.gpus, count_max[i]
            most = room // gpus if bound is None else min(bound, room // gpus)
            steps.append(_Step(i, gpus, room, most))
        open_ = tuple(columns[i].shape.gpus for i in own if count_max[i] is None)
        steps.append(_Step(None, 0, room, 0, open_))
    return tuple(steps)


def _most(step: _Step, used: int) -> int:
    return max(0, min(step.count_max, (step.room - used) // step.gpus))


def _waiting(step: _Step, used: int, waiting: int) -> int:
    """Who still finds room once a size is left: the one with fewest GPUs."""
    left = step.room - used
    return min((gpus for gpus in (waiting, *step.open_) if 0 < gpus <= left), default=NOBODY)


def _count(
    step: _Step,
    used: int,
    waiting: int,
    after: dict[tuple[int, int], int],
    here: dict[tuple[int, int], int],
) -> int:
    """Ways from a column on: none of it, or one and then what more GPUs in use leave."""
    then = used + step.gpus
    if step.count_max >= step.room // step.gpus:  # bounded by room alone
        more = here.get((then, waiting), 0) if then <= step.room else 0
        return after.get((used, waiting), 0) + more
    return sum(
        after.get((used + count * step.gpus, waiting), 0) for count in range(_most(step, used) + 1)
    )
