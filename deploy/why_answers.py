"""The answers of ``oserve why``: what ``--json`` prints, and what the tables are made of.

Times of day are unix seconds, all others seconds; what is not known is None or empty, and ``notes``
say why it is not, and what to do about it.
"""

import msgspec

from shared.messages.decisions import Decision, ReplicaOutlook
from shared.messages.replicas import ReplicaReport


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one type: expected, or seen. Lengths are means."""

    arrivals_rps: float
    input_tokens: float
    output_tokens: float
    ttft_s_mean: float | None = None
    tpot_s_mean: float | None = None


class TypeCompared(msgspec.Struct, frozen=True, kw_only=True):
    """One type: what was predicted when the plan was made, and what was seen since it is in force.
    ``requests``: completed ones behind what was seen. A type that appeared later has no
    prediction; one that vanished was not seen."""

    model_id: str
    request_type: str
    predicted: Figures | None = None
    seen: Figures | None = None
    requests: int = 0
    arrivals_rps_p10: float | None = None
    arrivals_rps_p90: float | None = None


class SwitchSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One switch as the switcher told of it. ``took_s``: None while it lasts."""

    plan_id: str
    started_at_s: float | None = None
    ended_at_s: float | None = None
    took_s: float | None = None
    succeeded: bool = False
    detail: str = ""
    stopping: tuple[str, ...] = ()
    starting: tuple[str, ...] = ()


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Why the plan in force is in force. ``decided_by``: the plan whose ``decision`` this is, made
    at ``decided_at_s`` for ``decided_reason``; it differs from ``plan_id`` when only routing
    weights changed since, and ``switch`` is the one that brought the replicas.
    ``kept``: the decision was to keep the plan, which had come without figures. ``seen_s``: how
    long was looked at for ``types``."""

    now_s: float
    plan_id: str
    epoch: int
    plan: str
    reason: str
    gpus: int
    pinned: bool = False
    switching_to: str = ""
    in_force_since_s: float | None = None
    proposed_at_s: float | None = None
    decided_by: str = ""
    decided_at_s: float | None = None
    decided_reason: str = ""
    kept: bool = False
    decision: Decision | None = None
    switch: SwitchSeen | None = None
    types: tuple[TypeCompared, ...] = ()
    seen_s: float = 0.0
    notes: tuple[str, ...] = ()


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Why nothing moves, or that something does. ``moving``: in words, when the scheduler asks for
    another plan; else the newest decision to keep. ``kept_since_s``: the first of ``times`` such
    decisions in a row. ``would_change``: what would have to be different for a switch."""

    now_s: float
    plan_id: str
    epoch: int
    plan: str
    pinned: bool = False
    in_force_since_s: float | None = None
    moving: str = ""
    reason: str = ""
    decided_at_s: float | None = None
    kept_since_s: float | None = None
    times: int = 0
    decision: Decision | None = None
    would_change: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ReplicaEventSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a replica, told by ``gpus`` in one epoch. ``began_at_s``, ``at_s``: the
    first and the last of them."""

    at_s: float
    began_at_s: float
    what: str
    epoch: int
    gpus: tuple[str, ...] = ()
    detail: str = ""


class ReplicaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Why a replica is what it is. ``shares``: by type, of its model's requests; ``phases``: by
    GPU, as the workers say; ``requests_rps`` and ``output_tokens_per_s``: what it served while it
    was listened to for ``listened_s``; ``why``: sentences."""

    now_s: float
    replica_id: str
    in_plan: bool
    model_id: str
    parallelism: str
    gpus: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    shares: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    phases: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    outlook: ReplicaOutlook | None = None
    load: ReplicaReport | None = None
    listened_s: float = 0.0
    requests_rps: float | None = None
    output_tokens_per_s: float | None = None
    why: tuple[str, ...] = ()
    events: tuple[ReplicaEventSeen, ...] = ()
    starts: int = 0
    failures: int = 0
    notes: tuple[str, ...] = ()
