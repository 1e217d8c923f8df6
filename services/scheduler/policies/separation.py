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

Within a part, shares are those of greatest headroom. Each split comes in three ways: strictly
apart; with a way out for shorter prompts, ``LEAK`` of them on the replicas of longer ones; and with
one for both. Whether apart is better than together, and which way, depends on bursts and targets:
that is for ``rehearsal.py`` to say.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.capacity_plan import Placed, spread
from services.scheduler.policies.flow import Array, Instance, best_flow
from services.scheduler.policies.weights import ANY_TYPE

APART = 1.25  # prompts that differ by less cannot be told apart by a router
LONG = 1  # the group of replicas for longer prompts; 0 is that of all others
NOTHING = 1e-9  # a solver's zero
SHARE_DIGITS = 4  # shares that differ by less are alike
LEAK = 0.1  # of a part, on the replicas of the other
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
    models = sorted({kind.model_id for kind in table.types})
    shares = np.zeros_like(table.rates)
    for model_id in models:
        own = [j for j, kind in enumerate(table.types) if kind.model_id == model_id]
        shares[:, own] = _shares(table, counts, table.rates, own)
    return Dispatch(table=table, counts=counts, shares=shares)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Apart:
    """One split in its three ways."""

    strict: Dispatch
    one_way: Dispatch
    both_ways: Dispatch


def apart(base: Dispatch, model_id: str) -> Iterator[Apart]:
    """``base`` with longer prompts of ``model_id``, whose replicas are in no groups yet, kept apart
    from its others; other models are left as they are."""
    table = base.table
    types = [j for j, kind in enumerate(table.types) if kind.model_id == model_id]
    types.sort(key=lambda j: table.types[j].input_tokens)
    own = {c: n for c, n in sorted(base.counts.items()) if c.model_id == model_id and n > 0}
    if sum(own.values()) < 2:  # noqa: PLR2004  # two groups need two replicas
        return
    for place in range(1, len(types)):
        shorter, longer = types[:place], types[place:]
        below, above = (table.types[j].input_tokens for j in (shorter[-1], longer[0]))
        if above < APART * below:
            continue
        threshold = (below * above) ** 0.5
        for long in splits(table, own, shorter, longer):
            strict = _parted(base, long, (shorter, longer), threshold)
            yield Apart(
                strict=strict,
                one_way=_leaky(strict, shorter, "shorter ones"),
                both_ways=_leaky(strict, types, "any"),
            )


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


def widened(table: Table, columns: Iterable[Column]) -> Table:
    """``table`` with a column for each group in ``columns``, which are of its own columns."""
    index = {column: s for s, column in enumerate(table.columns)}
    wide = tuple(sorted({*table.columns, *columns}))
    origins = [index[c if c in index else replace(c, group=0)] for c in wide]
    return replace(table, columns=wide, rates=table.rates[origins])


def as_weighted(
    table: Table, columns: Mapping[str, Column], rows: Mapping[str, Mapping[str, float]]
) -> tuple[Dispatch, dict[str, Column]]:
    """The dispatch that a plan's ``rows`` of weights are, for its replicas by column, and each
    replica's group: those of one column that get unlike shares are groups of it."""
    shares = {
        replica_id: tuple(
            rows.get(kind.name, rows.get(ANY_TYPE, {})).get(replica_id, 0.0)
            if kind.model_id == column.model_id
            else 0.0
            for kind in table.types
        )
        for replica_id, column in columns.items()
    }
    groups: dict[Column, list[tuple[float, ...]]] = {}
    own: dict[str, Column] = {}
    for replica_id, column in sorted(columns.items()):
        alike = groups.setdefault(column, [])
        rounded = tuple(round(share, SHARE_DIGITS) for share in shares[replica_id])
        if rounded not in alike:
            alike.append(rounded)
        own[replica_id] = replace(column, group=alike.index(rounded))
    wide = widened(table, own.values())
    index = {column: s for s, column in enumerate(wide.columns)}
    sent = np.zeros_like(wide.rates)
    for replica_id, column in own.items():
        sent[index[column]] += shares[replica_id]
    return Dispatch(table=wide, counts=Counter(own.values()), shares=spread(sent)), own


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
    base: Dispatch,
    long: Counter[Column],
    parts: tuple[Sequence[int], Sequence[int]],
    threshold: float,
) -> Dispatch:
    """``base`` with ``long`` for the types of the second of ``parts``."""
    (model_id,) = {column.model_id for column in long}
    moved = {replace(column, group=LONG): count for column, count in long.items()}
    counts = {**(Counter(base.counts) - long), **moved}
    index = {column: s for s, column in enumerate(base.table.columns)}
    table = widened(base.table, moved)
    columns, rates = table.columns, table.rates
    origins = [index[c if c in index else replace(c, group=0)] for c in columns]
    shares = base.shares[origins]
    shares[[s for s, c in enumerate(columns) if c not in index]] = 0.0
    for part, group in zip(parts, (0, LONG), strict=True):
        allowed = rates.copy()
        others = [s for s, c in enumerate(columns) if c.model_id == model_id and c.group != group]
        allowed[others] = 0.0
        shares[:, list(part)] = _shares(table, counts, allowed, part)
    total = sum(count for column, count in base.counts.items() if column.model_id == model_id)
    words = f"prompts over {threshold:.0f} tokens on {sum(long.values())} of {total} replicas"
    words = "; ".join(filter(None, (base.words, words)))
    return Dispatch(table=table, counts=counts, shares=shares, words=words)


def _leaky(strict: Dispatch, types: Sequence[int], which: str) -> Dispatch:
    """``strict`` with ``LEAK`` of ``types`` anywhere: little in calm, but routers divide shares by
    a replica's load, so that it is a way out of a queue."""
    copies = np.array([float(strict.counts.get(column, 0)) for column in strict.table.columns])
    anywhere = spread(strict.table.rates * copies[:, None])
    shares, some = strict.shares.copy(), list(types)
    shares[:, some] = (1.0 - LEAK) * shares[:, some] + LEAK * anywhere[:, some]
    return replace(strict, shares=shares, words=f"{strict.words}, {which} elsewhere at need")


def _shares(
    table: Table, counts: Mapping[Column, int], rates: Array, types: Sequence[int]
) -> Array:
    """[S, types] by greatest headroom over the arcs of ``rates``, for these types alone; those that
    have no arc there, or get nothing, go wherever they can be served at all."""
    copies = np.array([float(counts.get(column, 0)) for column in table.columns])
    shares = spread(table.rates[:, list(types)] * copies[:, None])
    servable = np.flatnonzero((rates[:, list(types)] * copies[:, None]).any(axis=0))
    kept = [types[int(i)] for i in servable]
    if not kept:
        return shares
    unbounded = np.full((len(copies), len(kept)), np.inf)
    flow = best_flow(Instance(rates[:, kept], unbounded, copies, table.demand[kept]), "headroom")
    assert flow is not None, "no flow at all is a flow"
    sent = flow.shares()
    shares[:, servable] = np.where(sent.any(axis=0), spread(sent), shares[:, servable])
    return shares
