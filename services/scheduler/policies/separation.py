"""Which replicas serve long prompts, and which the rest: dispatches that keep types apart.

The dispatch of greatest headroom spreads types over all replicas. In a burst all of them are then
late together, and each long prompt takes step time from everybody who decodes beside it. Replicas
that long prompts have to themselves confine both: the others stay in time. Output lengths are not
known when a request is sent, prompts are, so types are parted by prompt length alone.

For the replicas of one model, types in order of their prompts, and each place at which prompts grow
by ``APART`` or more, the longer types get k replicas and the others the rest. Replicas that serve
the longer types best, compared with how they serve the others, come first. k is where the worse off
of both parts could carry most, and its neighbours:

    w[s, G]    sum over types j of part G of d[j] / n[s, j]: replicas of column s that G would fill
    carry(G)   sum over replicas of G of 1 / w[s, G]

Within a part, shares are those of greatest headroom. Whether apart is better than together depends
on bursts and targets: that is for ``rehearsal.py`` to say.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.capacity_plan import Placed, spread
from services.scheduler.policies.flow import Array, Instance, best_flow

APART = 1.25  # prompts that differ by less cannot be told apart by a router
LONG = 1  # the group of replicas for longer prompts; 0 is that of all others
NOTHING = 1e-9  # a solver's zero
NEIGHBOURS = 1 / 16  # of the replicas: how far from the even split others are tried


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Dispatch:
    """``table`` has a column for each group of ``counts``; ``shares`` [S, J] are by its columns.
    ``words``: what is kept apart, empty when nothing is."""

    table: Table
    counts: Mapping[Column, int]
    shares: Array
    words: str = ""


def together(table: Table, counts: Mapping[Column, int]) -> Dispatch:
    """All types on all replicas, by greatest headroom; types that nothing can serve are left
    out."""
    return Dispatch(table=table, counts=counts, shares=_shares(table, counts, table.rates))


def apart(table: Table, counts: Mapping[Column, int], model_id: str) -> Iterator[Dispatch]:
    """Dispatches of ``counts`` that keep longer prompts of ``model_id`` apart from its others."""
    types = [j for j, kind in enumerate(table.types) if kind.model_id == model_id]
    types.sort(key=lambda j: table.types[j].input_tokens)
    own = {c: n for c, n in sorted(counts.items()) if c.model_id == model_id and n > 0}
    if sum(own.values()) < 2:  # noqa: PLR2004  # two groups need two replicas
        return
    for place in range(1, len(types)):
        shorter, longer = types[:place], types[place:]
        below, above = (table.types[j].input_tokens for j in (shorter[-1], longer[0]))
        if above < APART * below:
            continue
        threshold = (below * above) ** 0.5
        for long in splits(table, own, shorter, longer):
            yield _parted(table, counts, long, (shorter, longer), threshold)


def splits(
    table: Table, own: Mapping[Column, int], shorter: Sequence[int], longer: Sequence[int]
) -> list[Counter[Column]]:
    """Which replicas serve the ``longer`` types: the most even split and its neighbours."""
    index = {column: s for s, column in enumerate(table.columns)}
    rows = [index[column] for column in own]
    with np.errstate(divide="ignore"):
        time = table.demand / table.rates[rows]
        full = np.stack([time[:, list(longer)].sum(axis=1), time[:, list(shorter)].sum(axis=1)])
        carry = np.where(np.isfinite(full), 1.0 / full, 0.0)  # [2, columns]
        advantage = carry[0] / np.maximum(carry[1], NOTHING)
    columns = list(own)
    order = sorted(range(len(columns)), key=lambda i: (-advantage[i], columns[i]))
    each = np.array([i for i in order for _ in range(own[columns[i]])])
    for_longer = np.cumsum(carry[0][each])[:-1]  # by the first 1, 2, ... replicas
    for_shorter = np.cumsum(carry[1][each][::-1])[::-1][1:]
    worse = np.minimum(for_longer, for_shorter)
    if not worse.any():
        return []
    best = int(worse.argmax())
    reach = max(1, round(len(each) * NEIGHBOURS))
    places = sorted({min(max(best + d, 0), len(worse) - 1) for d in (-reach, 0, reach)})
    return [Counter(columns[int(i)] for i in each[: k + 1]) for k in places if worse[k] > 0]


def deal(placed: Placed, counts: Mapping[Column, int]) -> Placed:
    """``placed`` with its replicas dealt out to the groups of ``counts``: always the same ones for
    the same counts, those of lower ids to higher groups."""
    left = Counter(counts)
    groups = sorted({column.group for column in counts}, reverse=True)
    columns: dict[str, Column] = {}
    for replica_id, column in sorted(placed.columns.items()):
        options = [replace(column, group=group) for group in groups]
        chosen = next((option for option in options if left[option] > 0), column)
        left[chosen] -= 1
        columns[replica_id] = chosen
    return replace(placed, columns=columns)


def ungrouped(counts: Mapping[Column, int]) -> Counter[Column]:
    """Replicas by column, whatever their group."""
    found: Counter[Column] = Counter()
    for column, count in counts.items():
        found[replace(column, group=0)] += count
    return +found


def _parted(
    table: Table,
    counts: Mapping[Column, int],
    long: Counter[Column],
    parts: tuple[Sequence[int], Sequence[int]],
    threshold: float,
) -> Dispatch:
    """``counts`` with ``long`` for the types of the second of ``parts``."""
    moved = {replace(column, group=LONG): count for column, count in long.items()}
    split = {**(Counter(counts) - long), **moved}
    base = {column: s for s, column in enumerate(table.columns)}
    columns = tuple(sorted({*table.columns, *moved}))
    rates = table.rates[[base[replace(column, group=0)] for column in columns]]
    wide = replace(table, columns=columns, rates=rates)
    allowed = rates.copy()
    models = {column.model_id for column in long}
    for s, column in enumerate(columns):
        if column.model_id in models:
            allowed[s, list(parts[0 if column.group == LONG else 1])] = 0.0
    total = sum(count for column, count in counts.items() if column.model_id in models)
    words = f"prompts over {threshold:.0f} tokens on {sum(long.values())} of {total} replicas"
    return Dispatch(table=wide, counts=split, shares=_shares(wide, split, allowed), words=words)


def _shares(table: Table, counts: Mapping[Column, int], rates: Array) -> Array:
    """[S, J] by greatest headroom over the arcs of ``rates``, each model by itself; types that have
    no arc there, or get nothing, go wherever they can be served at all."""
    copies = np.array([float(counts.get(column, 0)) for column in table.columns])
    shares = spread(table.rates * copies[:, None])
    servable = (rates * copies[:, None]).any(axis=0)
    for model_id in sorted({kind.model_id for kind in table.types}):
        kept = [
            j for j, kind in enumerate(table.types) if kind.model_id == model_id and servable[j]
        ]
        if not kept:
            continue
        unbounded = np.full((len(copies), len(kept)), np.inf)
        some = Instance(rates[:, kept], unbounded, copies, table.demand[kept])
        flow = best_flow(some, "headroom")
        assert flow is not None, "no flow at all is a flow"
        sent = flow.shares()
        shares[:, kept] = np.where(sent.any(axis=0), spread(sent), shares[:, kept])
    return shares
