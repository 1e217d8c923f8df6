"""What fits beside the old: stages of layers, and how much KV cache new ranks may have meanwhile.

Of each GPU, at each moment: weights of the old rank that are not freed + its KV cache + weights of
the new rank fetched so far + its KV cache <= budget. Old and new are counted whole, whatever they
share.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from services.switcher.transfer.layout import EDGES, Layout, Part
from services.switcher.transfer.problem import EMPTY, Held, Move, TransferProblem
from services.switcher.transfer.stages import Bytes, Ledger, stages_of
from shared.placement.sheets import Span


@dataclass(frozen=True, slots=True)
class Staging:
    """``edges``: the stage of embedding, output and final norm. ``replayed``: moves whose KV cache
    is given up. ``wrong``: why it cannot be done."""

    stages: tuple[Span, ...] = (EMPTY,)
    edges: int = 0
    cache_bytes_max: dict[str, int] = field(default_factory=dict[str, int])
    replayed: tuple[Move, ...] = ()
    wrong: str = ""


def stage(problem: TransferProblem, layout: Layout) -> Staging:
    """The fewest stages that were found, with as much of the requests' KV cache as fits: the moves
    with most of it onto GPUs that are short are given up first."""
    ledger = _ledger(problem, layout)
    all_cache = _cache_needed(problem, layout, ledger.gpus, problem.moves)
    able = _in_the_way(problem, layout, ledger, all_cache)

    def tried(given_up: int) -> Staging | None:
        dropped = able[:given_up]
        kept = [move for move in problem.moves if move not in dropped]
        cache = _cache_needed(problem, layout, ledger.gpus, kept)
        found = stages_of(ledger, cache)
        if found is None:
            return None
        return Staging(
            stages=found.spans,
            edges=found.edges,
            cache_bytes_max=_cache_max(problem, layout, ledger, found.slack + cache),
            replayed=tuple(dropped),
        )

    best = tried(0)
    if best is not None:
        return best
    best = tried(len(able))
    if best is None:
        return Staging(wrong=_reason(ledger, _cache_needed(problem, layout, ledger.gpus, ())))
    low, high = 0, len(able)  # ``low`` are too few, ``high`` enough
    while high - low > 1:
        middle = (low + high) // 2
        found = tried(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _ledger(problem: TransferProblem, layout: Layout) -> Ledger:
    involved = {part.gpu for part in layout.new}
    gpus = tuple(sorted(gpu for gpu in involved if problem.budget_bytes.get(gpu, 0) > 0))
    at = {gpu: i for i, gpu in enumerate(gpus)}
    ledger = Ledger(
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
    problem: TransferProblem, layout: Layout, ledger: Ledger, room: Bytes
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


def _in_the_way(
    problem: TransferProblem, layout: Layout, ledger: Ledger, cache: Bytes
) -> list[Move]:
    """Moves of KV cache onto GPUs where all does not fit at once, the largest first."""
    need = ledger.fixed + cache + ledger.edges + ledger.old.sum(axis=1) + ledger.new.sum(axis=1)
    tight = {gpu for gpu, over in zip(ledger.gpus, need > ledger.budget, strict=True) if over}
    targets = {part.replica_id for part in layout.new if part.gpu in tight}
    able = [move for move in problem.moves if move.target in targets and move.tokens > 0]
    return sorted(able, key=lambda move: (-move.tokens, move.source, move.target))


def _reason(ledger: Ledger, cache: Bytes) -> str:
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
