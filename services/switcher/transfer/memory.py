"""What fits beside the old: stages of layers, and how much KV cache new ranks may have meanwhile.

Of each GPU, at each moment: weights of the old rank that are not freed + its KV cache + weights of
the new rank fetched so far + its KV cache <= budget. Old and new are counted whole, whatever they
share.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.switcher.transfer.layout import EDGES, Layout, Part
from services.switcher.transfer.problem import EMPTY, Held, Move, TransferProblem
from shared.placement.sheets import Span

Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Staging:
    """``edges``: the stage of embedding, output and final norm. ``replayed``: moves whose KV cache
    is given up. ``wrong``: why it cannot be done."""

    stages: tuple[Span, ...] = (EMPTY,)
    edges: int = 0
    cache_bytes_max: dict[str, int] = field(default_factory=dict[str, int])
    replayed: tuple[Move, ...] = ()
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class _Ledger:
    """Of each GPU with a budget, in bytes. ``fixed``: what stays until the end, KV cache of the new
    rank apart. ``old``, ``new``: by layer."""

    gpus: tuple[str, ...]
    budget: Bytes  # [gpus]
    fixed: Bytes  # [gpus]
    edges: Bytes  # [gpus], of the new rank
    old: Bytes  # [gpus, layers]
    new: Bytes  # [gpus, layers]


def stage(problem: TransferProblem, layout: Layout) -> Staging:
    """The fewest stages that were found, with as much of the requests' KV cache as fits."""
    ledger = _ledger(problem, layout)
    kept = list(problem.moves)
    dropped: list[Move] = []
    while True:
        cache = _cache_needed(problem, layout, ledger.gpus, kept)
        found = _stages(ledger, cache)
        if found is not None:
            stages, edges, room = found
            return Staging(
                stages=stages,
                edges=edges,
                cache_bytes_max=_cache_max(problem, layout, ledger, room),
                replayed=tuple(dropped),
            )
        victim = _largest_in_the_way(layout, ledger, cache, kept)
        if victim is None:
            return Staging(wrong=_reason(ledger, cache))
        kept.remove(victim)
        dropped.append(victim)


def _ledger(problem: TransferProblem, layout: Layout) -> _Ledger:
    involved = {part.gpu for part in layout.new}
    gpus = tuple(sorted(gpu for gpu in involved if problem.budget_bytes.get(gpu, 0) > 0))
    at = {gpu: i for i, gpu in enumerate(gpus)}
    ledger = _Ledger(
        gpus=gpus,
        budget=np.array([problem.budget_bytes[gpu] for gpu in gpus], dtype=np.int64),
        fixed=np.array([problem.held.get(gpu, Held()).cache_bytes for gpu in gpus], dtype=np.int64),
        edges=np.zeros(len(gpus), dtype=np.int64),
        old=np.zeros((len(gpus), layout.layers), dtype=np.int64),
        new=np.zeros((len(gpus), layout.layers), dtype=np.int64),
    )
    for part in layout.old:
        if part.gpu in at:
            into = ledger.old if part.goes else None
            _enter(layout, part, at[part.gpu], edges=ledger.fixed, layers=into)
    for part in layout.new:
        if part.gpu in at:
            _enter(layout, part, at[part.gpu], edges=ledger.edges, layers=ledger.new)
    return ledger


def _enter(layout: Layout, part: Part, row: int, *, edges: Bytes, layers: Bytes | None) -> None:
    """``layers`` None: what is never freed, and counts as ``edges``."""
    for name, area in part.areas.items():
        if name == "cache":
            continue
        cell_bytes = layout.sheets[part.model_id][name].cell_bytes
        if name in EDGES or layers is None:
            edges[row] += area.cells * cell_bytes
        else:
            units = area.units[1] - area.units[0]
            layers[row, area.layers[0] : area.layers[1]] += units * cell_bytes


def _cache_needed(
    problem: TransferProblem, layout: Layout, gpus: tuple[str, ...], moves: Iterable[Move]
) -> Bytes:
    """KV cache that new ranks must have at least for ``moves``, no more than is configured."""
    tokens: dict[str, int] = {}
    for move in moves:
        tokens[move.target] = tokens.get(move.target, 0) + move.tokens
    needed = dict.fromkeys(gpus, 0)
    for part in layout.new:
        if part.gpu not in needed:
            continue
        least = problem.cache_tokens_min * layout.token_bytes(part)
        moved = int(problem.headroom * tokens.get(part.replica_id, 0) * layout.token_bytes(part))
        configured = problem.cache_bytes.get(part.gpu, 0)
        if configured:
            moved = min(moved, configured)
        needed[part.gpu] += max(least, moved)
    return np.array([needed[gpu] for gpu in gpus], dtype=np.int64)


def _cache_max(
    problem: TransferProblem, layout: Layout, ledger: _Ledger, room: Bytes
) -> dict[str, int]:
    left = dict(zip(ledger.gpus, room.tolist(), strict=True))
    configured = problem.cache_bytes
    found: dict[str, int] = {}
    for part in layout.new:
        if part.gpu in left:
            found[part.gpu] = min(left[part.gpu], configured.get(part.gpu, 0) or left[part.gpu])
        else:
            found[part.gpu] = 0
    return found


def _stages(ledger: _Ledger, cache: Bytes) -> tuple[tuple[Span, ...], int, Bytes] | None:
    """Stages, the stage of the edges, and the room for KV cache that is left at the worst moment.
    None if nothing that was tried fits."""
    free = ledger.budget - ledger.fixed - cache - ledger.old.sum(axis=1)
    after = free - ledger.edges - ledger.new.sum(axis=1)
    if not len(ledger.gpus) or after.min() >= 0:
        return (EMPTY,), 0, after + cache
    if (after + ledger.old.sum(axis=1)).min() < 0:
        return None  # not even when all of the old is freed
    tried = (
        order
        for pick in (_longest, _first, _last)
        for order in (
            _walk(ledger, free - ledger.edges, pick, edges_first=True),
            _walk(ledger, free, pick, edges_first=False),
        )
        if order is not None
    )
    best = min(tried, key=lambda found: len(found[0]), default=None)
    if best is None:
        return None
    stages, edges, slack = best
    return stages, edges, slack + cache


Pick = Callable[[_Ledger, Bytes, list[Span]], Span]


def _walk(
    ledger: _Ledger, free: Bytes, pick: Pick, *, edges_first: bool
) -> tuple[tuple[Span, ...], int, Bytes] | None:
    """Stages one by one, each as ``pick`` wishes. ``free`` is what is left of each GPU now."""
    left: list[Span] = [(0, ledger.old.shape[1])]
    stages: list[Span] = []
    slack = free.copy()
    while left:
        span = pick(ledger, free, left)
        if span[0] == span[1]:
            return None
        stages.append(span)
        left = [rest for run in left for rest in _without(run, span)]
        free = free - ledger.new[:, span[0] : span[1]].sum(axis=1)
        slack = np.minimum(slack, free)
        edges_due = not left and not edges_first
        if edges_due and (free - ledger.edges).min() >= 0:
            free = free - ledger.edges
            slack = np.minimum(slack, free)
            edges_due = False
        free = free + ledger.old[:, span[0] : span[1]].sum(axis=1)
        if edges_due:
            stages.append(EMPTY)  # the edges alone, when every layer is freed
            slack = np.minimum(slack, free - ledger.edges)
    if slack.min() < 0:
        return None
    return tuple(stages), 0 if edges_first else len(stages) - 1, slack


def _longest(ledger: _Ledger, free: Bytes, left: list[Span]) -> Span:
    """The longest span that fits, begun wherever a rank begins or ends; of alike ones the one
    after which the fullest GPU has most left."""
    held = np.concatenate((ledger.old, ledger.new))
    borders = (np.flatnonzero(np.any(held[:, 1:] != held[:, :-1], axis=0)) + 1).tolist()
    best, best_key = EMPTY, (0, 0)
    for run in left:
        for start in {run[0], *(border for border in borders if run[0] < border < run[1])}:
            span = _fitting(ledger, free, (start, run[1]))
            gained = ledger.old[:, span[0] : span[1]].sum(axis=1)
            lost = ledger.new[:, span[0] : span[1]].sum(axis=1)
            key = (span[1] - span[0], int((free + gained - lost).min()))
            if key > best_key:
                best, best_key = span, key
    return best


def _first(ledger: _Ledger, free: Bytes, left: list[Span]) -> Span:
    return _fitting(ledger, free, left[0])


def _last(ledger: _Ledger, free: Bytes, left: list[Span]) -> Span:
    start, stop = left[-1]
    turned = ledger.new[:, start:stop][:, ::-1]
    return stop - _count(turned, free), stop


def _fitting(ledger: _Ledger, free: Bytes, run: Span) -> Span:
    return run[0], run[0] + _count(ledger.new[:, run[0] : run[1]], free)


def _count(layers: Bytes, free: Bytes) -> int:
    """How many of the leading layers fit on every GPU."""
    return int(np.all(layers.cumsum(axis=1) <= free[:, None], axis=0).sum())


def _without(run: Span, span: Span) -> list[Span]:
    if span[1] <= run[0] or run[1] <= span[0]:
        return [run]
    rest = ((run[0], span[0]), (span[1], run[1]))
    return [part for part in rest if part[0] < part[1]]


def _largest_in_the_way(
    layout: Layout, ledger: _Ledger, cache: Bytes, kept: list[Move]
) -> Move | None:
    """The move with most KV cache among those onto GPUs where all does not fit at once."""
    need = ledger.fixed + cache + ledger.edges + ledger.old.sum(axis=1) + ledger.new.sum(axis=1)
    tight = {gpu for gpu, over in zip(ledger.gpus, need > ledger.budget, strict=True) if over}
    targets = {part.replica_id for part in layout.new if part.gpu in tight}
    able = [move for move in kept if move.target in targets and move.tokens > 0]
    return max(able, key=lambda move: (move.tokens, move.source, move.target), default=None)


def _reason(ledger: _Ledger, cache: Bytes) -> str:
    end = ledger.fixed + cache + ledger.edges + ledger.new.sum(axis=1)
    over = end - ledger.budget
    worst = int(over.argmax())
    if over[worst] > 0:
        return (
            f"{ledger.gpus[worst]}: new weights and both KV caches take {int(end[worst])} bytes "
            f"of {int(ledger.budget[worst])}"
        )
    full = end + ledger.old.sum(axis=1) - ledger.budget
    worst = int(full.argmax())
    return (
        f"{ledger.gpus[worst]}: old and new exceed {int(ledger.budget[worst])} bytes by "
        f"{int(full[worst])}, and no order of layers fits"
    )
