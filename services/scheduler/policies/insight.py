"""What a plan hangs on: which replicas are its bottleneck, and what more GPUs would bring.

``bottlenecks`` reads the duals of the flow through replicas that are given (``flow.duals``): what
one more replica of a column would bring at most, and so what one more GPU there is worth. That is a
first-order answer: GPUs come in the sizes of shapes, and other shapes may make more of them. So
``one_more`` solves the joint program anew with more GPUs in a pool: with one, with a whole node,
and with the fewest that bring anything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Column, Pool, Table
from services.scheduler.policies.flow import duals
from services.scheduler.policies.joint import Goal, Solution, Terms, best_joint
from services.scheduler.policies.joint_terms import GREATEST

NOTHING = 1e-9  # relative: a solver's zero
SOLVED_MAX = 5  # programs for one pool: of one GPU, of a node, and halving in between
TOLD_MAX = 4  # columns that change, told one by one
UNITS: Mapping[Goal, str] = {
    "headroom": "times the demand",
    "gentle": "of cost",
    "served": "requests/s",
    "thrift": "per hour",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serves:
    """One column of a plan. ``headroom``: what one more replica would add to the plan's, at most;
    the other figures follow from it. ``requests_per_s``: of the mix that is expected."""

    column: Column
    count: int
    headroom: float
    headroom_per_gpu: float
    requests_per_s: float
    requests_per_s_per_gpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottlenecks:
    """``columns``: all, those first of which one more GPU would bring most. ``types``: by (model,
    type), the share of what the replicas are worth that it takes; those that take none left out."""

    headroom: float
    columns: tuple[Serves, ...]
    types: Mapping[tuple[str, str], float]

    @property
    def narrowest(self) -> Serves | None:
        """The column in use of which one more GPU would bring most; None if there is none."""
        return next((w for w in self.columns if w.count and w.headroom > 0.0), None)

    def in_words(self) -> str:
        worst = max(self.types, key=lambda name: self.types[name], default=None)
        if worst is None:
            return "nothing is expected, so that nothing is a bottleneck"
        model_id, name = worst
        narrowest, every = self.narrowest, [worth.column for worth in self.columns]
        if narrowest is None or self.headroom <= 0.0:
            return f"no replica serves type {name} of {model_id}"
        return (
            f"the bottleneck is {_listed({narrowest.column: narrowest.count}, every)}: one more "
            f"would carry at most {narrowest.headroom:.3g} times the demand more "
            f"({narrowest.requests_per_s:.3g} requests/s), {narrowest.headroom_per_gpu:.3g} for "
            f"each GPU; type {name} of {model_id} takes {self.types[worst]:.0%} of the capacity"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class More:
    """The plan with ``gpus`` more. ``objective`` None: there is still none; ``brings``: proven to
    be better than any plan without them."""

    gpus: int
    objective: float | None
    counts: Mapping[Column, int]
    brings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """More GPUs in one pool. ``least``: the fewest that bring anything, None when not even a
    ``node`` does. ``before``: the objective without, None when there is no plan."""

    pool: str
    goal: Goal
    before: float | None
    counts: Mapping[Column, int]
    one: More
    node: More
    least: More | None

    def in_words(self) -> str:
        if self.least is None:
            many = f"{self.node.gpus} more GPUs" if self.node.gpus > 1 else "one more GPU"
            return f"{many} of {self.pool} would bring nothing"
        parts = [] if self.one.brings else ["one more GPU would bring nothing"]
        parts.append(self._brought(self.least))
        if self.node.gpus > self.least.gpus:
            parts.append(self._brought(self.node))
        return f"{self.pool}: " + "; ".join(parts)

    def _brought(self, more: More) -> str:
        what = "one more GPU" if more.gpus == 1 else f"{more.gpus} more GPUs"
        unit = UNITS[self.goal]
        if self.before is None:
            return f"{what} would make a plan possible, of {more.objective:.3g} {unit}"
        new = Counter(more.counts) - Counter(self.counts)
        old = Counter(self.counts) - Counter(more.counts)
        every = [*self.counts, *more.counts]
        change = f"{_listed(new, every)} more"
        if old:
            change = f"{_listed(new, every)} instead of {_listed(old, every)}"
        if len(new) + len(old) > TOLD_MAX:
            change = f"{new.total()} other replicas instead of {old.total()}"
        percent = ""
        if self.before and more.objective is not None:
            percent = f" ({more.objective / self.before - 1:+.1%})"
        return (
            f"{what} would take it from {self.before:.3g} to {more.objective:.3g} {unit}{percent}, "
            f"with {change}"
        )


def bottlenecks(table: Table, counts: Mapping[Column, int]) -> Bottlenecks:
    """What the headroom of ``counts`` hangs on. ``table`` has a column."""
    found = duals(table.instance(counts), "headroom")
    total = float(table.demand.sum())
    columns: list[Serves] = []
    for s, column in enumerate(table.columns):
        gain, gpus = float(found.replica[s]), column.shape.gpus
        columns.append(
            Serves(
                column=column,
                count=counts.get(column, 0),
                headroom=gain,
                headroom_per_gpu=gain / gpus,
                requests_per_s=gain * total,
                requests_per_s_per_gpu=gain * total / gpus,
            )
        )
    columns.sort(key=lambda worth: (-worth.headroom_per_gpu, worth.column))
    types = {
        (kind.model_id, kind.name): float(share)
        for kind, share in zip(table.types, found.types, strict=True)
        if share > NOTHING
    }
    return Bottlenecks(headroom=found.optimum, columns=tuple(columns), types=types)


def one_more(
    table: Table, goal: Goal, terms: Terms, best: Solution | None, *, time_limit_s: float
) -> tuple[Extension, ...]:
    """For each pool, what more GPUs would bring to ``best``, the solution for ``goal`` under
    ``terms`` (None: there is none). At most ``SOLVED_MAX`` programs for each pool, of
    ``time_limit_s`` in all. Shapes are those of ``table``: one that would fit only with more GPUs
    is none of them."""
    share_s = time_limit_s / (SOLVED_MAX * max(1, len(table.pools)))

    def solved(pool: Pool, gpus: int) -> More:
        more = replace(table, pools={**table.pools, pool.name: larger(pool, gpus)})
        found = best_joint(more, goal, terms, time_limit_s=share_s)
        return More(
            gpus=gpus,
            objective=None if found is None else found.objective,
            counts={} if found is None else found.counts,
            brings=_brings(goal, best, found),
        )

    extensions: list[Extension] = []
    for pool in table.pools.values():
        one, node = solved(pool, 1), solved(pool, _node_size(pool))
        least = one if one.brings else node
        low = 1  # brings nothing
        while least.brings and least.gpus > low + 1 and not one.brings:
            middle = solved(pool, (low + least.gpus) // 2)
            low, least = (low, middle) if middle.brings else (middle.gpus, least)
        extensions.append(
            Extension(
                pool=pool.name,
                goal=goal,
                before=None if best is None else best.objective,
                counts={} if best is None else best.counts,
                one=one,
                node=node,
                least=least if least.brings else None,
            )
        )
    return tuple(extensions)


def larger(pool: Pool, gpus: int) -> Pool:
    """``pool`` with so many GPUs more: nodes that lack some are filled first, the fullest before
    the others, then there are new nodes of the same size: the power of two that the largest node
    has, or had before it lost some."""
    size, nodes = _node_size(pool), list(pool.node_gpus)
    left = gpus
    for i, have in enumerate(nodes):
        added = min(left, size - have)
        nodes[i], left = have + added, left - added
    while left:
        nodes.append(min(left, size))
        left -= nodes[-1]
    return replace(pool, node_gpus=tuple(sorted(nodes, reverse=True)))


def _listed(counts: Mapping[Column, int], every: Iterable[Column]) -> str:
    """``2 x tp4``; with models and pools where ``every`` has several."""
    among = set(every)
    models, pools = {each.model_id for each in among}, {each.pool for each in among}
    parts: list[str] = []
    for column, count in sorted(counts.items()):
        model = f"{column.model_id} " if len(models) > 1 else ""
        place = f" on {column.pool}" if len(pools) > 1 else ""
        parts.append(f"{count} x {model}{str(column.shape).removesuffix('pp1')}{place}")
    return ", ".join(parts) or "nothing"


def _node_size(pool: Pool) -> int:
    return 1 << (pool.node_gpus[0] - 1).bit_length()


def _brings(goal: Goal, before: Solution | None, after: Solution | None) -> bool:
    """Whether ``after`` is better than anything that was possible before."""
    if after is None or before is None:
        return after is not None
    gain = after.objective - before.bound if goal in GREATEST else before.bound - after.objective
    return gain > NOTHING * abs(before.objective)
