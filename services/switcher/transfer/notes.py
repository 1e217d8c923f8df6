"""What a person should know of the memory of a switch."""

from collections import defaultdict

from services.switcher.transfer.layout import Layout
from services.switcher.transfer.memory import Staging
from services.switcher.transfer.problem import TransferProblem


def memory_notes(problem: TransferProblem, layout: Layout, staging: Staging) -> list[str]:
    """Stages, and KV cache that does not fit."""
    notes: list[str] = []
    if len(staging.stages) > 1:
        notes.append(f"old and new do not fit side by side: {len(staging.stages)} stages")
    notes += (
        f"{move.tokens} tokens of {move.source} for {move.target} do not fit: replayed"
        for move in staging.replayed
    )
    tokens: defaultdict[str, int] = defaultdict(int)
    for move in problem.moves:
        if move not in staging.replayed:
            tokens[move.target] += move.tokens
    room = _room_tokens(problem, layout, staging)
    notes += (
        f"{count - room[target]} of {count} tokens for {target} do not fit: replayed"
        for target, count in tokens.items()
        if count > room.get(target, count)
    )
    return notes


def _room_tokens(problem: TransferProblem, layout: Layout, staging: Staging) -> dict[str, int]:
    """Tokens that the KV cache of each replica has room for, where that is known."""
    free = [(part, staging.cache_bytes_max.get(part.gpu, 0)) for part in layout.new]
    free = [(part, size) for part, size in free if size > 0]
    for part in layout.old:
        held = problem.held.get(part.gpu)
        if held is not None and held.cache_bytes > 0:
            free.append((part, held.cache_bytes - held.cache_used_bytes))
    room: dict[str, int] = {}
    for part, size in free:
        fits = max(0, size // layout.token_bytes(part))
        room[part.replica_id] = min(fits, room.get(part.replica_id, fits))
    return room
