"""Llumnix's live migration: which running requests move from which replica to which.

After Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving" (OSDI 2024), with
the defaults of its released code (AlibabaPAI/llumnix): load is measured in *remaining steps*, the
KV that is free less what waiting requests need, over the number of requests; replicas that have
less than three blocks left per request give, the others take; the neediest giver is paired with
the freest taker ("defrag"); the giver's shortest running request goes ("SR"); a replica takes part
in one migration at a time; the request pauses for 20 to 30 ms, whatever its length, since its KV
is copied in stages while it goes on decoding.

Their global scheduler looks every 0.05 s. ``POLL_S`` is 0.5 s: three blocks are 48 tokens for
each request, more than a second of decoding at any step time above 25 ms, so that a replica is
seen in time, and a tenth of the looks are needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

POLL_S = 0.5
PAUSE_S = 0.025
BLOCK_TOKENS = 16
REMAINING_TOKENS_MIN = 3 * BLOCK_TOKENS
"""With less free KV per request a replica gives requests away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica of one model, in tokens of KV. ``kv_waiting``: what its waiting requests will
    need. ``requests``: its running ones, each with the KV it holds. ``busy``: it takes part in a
    migration that has not ended."""

    replica_id: str
    running: int
    waiting: int
    kv_free: int
    kv_waiting: int
    requests: Sequence[tuple[str, int]] = ()
    busy: bool = False

    @property
    def remaining_tokens(self) -> float:
        """Tokens that each request may still grow by; without requests there is no limit."""
        count = self.running + self.waiting
        return (self.kv_free - self.kv_waiting) / count if count else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Copy a request's KV over and continue it there; it pauses for ``pause_s`` at the end of the
    copy. ``decided_s``: when."""

    key: str
    from_id: str
    to_id: str
    kv_tokens: int
    decided_s: float
    pause_s: float = PAUSE_S


def migrations(loads: Sequence[ReplicaView], now_s: float) -> list[Move]:
    """What to move now, at most one request for each replica. ``loads`` are of one model; the same
    loads in any order give the same moves."""
    free = [view for view in loads if not view.busy]
    givers = [v for v in free if v.running and v.remaining_tokens < REMAINING_TOKENS_MIN]
    if not givers:
        return []
    takers = [v for v in free if v.remaining_tokens > REMAINING_TOKENS_MIN]
    givers.sort(key=lambda view: (view.remaining_tokens, view.replica_id))
    takers.sort(key=lambda view: (-view.remaining_tokens, -view.kv_free, view.replica_id))
    moves: list[Move] = []
    for giver, taker in zip(givers, takers, strict=False):
        chosen = _shortest(giver)
        if chosen is None or not _has_room(taker, chosen[1]):
            continue
        moves.append(
            Move(
                key=chosen[0],
                from_id=giver.replica_id,
                to_id=taker.replica_id,
                kv_tokens=chosen[1],
                decided_s=now_s,
            )
        )
    return moves


def _shortest(giver: ReplicaView) -> tuple[str, int] | None:
    return min(giver.requests, key=lambda request: (request[1], request[0]), default=None)


def _has_room(taker: ReplicaView, kv_tokens: int) -> bool:
    """Whether it would not become a giver itself, which would send the request back and forth."""
    left = taker.kv_free - taker.kv_waiting - kv_tokens
    return left / (taker.running + taker.waiting + 1) >= REMAINING_TOKENS_MIN
