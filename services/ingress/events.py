"""What the ingress core hears besides route replies, and what it hands to its ``fail`` job."""

from typing import Literal

import msgspec

from services.ingress.journey import Journey
from shared.messages.requests import FailureCode, FinishReason, RouteReply

LossReason = Literal["refused", "failed", "stalled", "gap", "incarnation", "unacknowledged"]


class Arrived(msgspec.Struct, frozen=True):
    journey: Journey


class Acknowledged(msgspec.Struct, frozen=True):
    """The replica took this attempt, or sent its first sign of life for it."""

    request_id: str
    attempt: int
    incarnation: str


class AttemptLost(msgspec.Struct, frozen=True):
    request_id: str
    attempt: int
    reason: LossReason
    failure: FailureCode | None = None
    detail: str = ""


class TakenOver(msgspec.Struct, frozen=True):
    """Another replica than the journey's works on this attempt. ``leader_id`` may be empty."""

    request_id: str
    attempt: int
    replica_id: str
    leader_id: str
    incarnation: str


class LeaderHeard(msgspec.Struct, frozen=True):
    """This worker leads the replica now."""

    replica_id: str
    leader_id: str


class ReplicaRestarted(msgspec.Struct, frozen=True):
    """The replica is led by another run of a worker: what the former run had is lost."""

    replica_id: str
    incarnation: str


class Reconnected(msgspec.Struct, frozen=True):
    """The broker is back: what was said meanwhile is lost, perhaps the last word of a stream."""


class Finished(msgspec.Struct, frozen=True):
    """The last token was taken."""

    request_id: str
    finish: FinishReason


class ClientGone(msgspec.Struct, frozen=True):
    request_id: str


class StaleChunk(msgspec.Struct, frozen=True):
    """A chunk of an attempt that we gave up: its worker should stop."""

    request_id: str
    attempt: int
    replica_id: str


class Sweep(msgspec.Struct, frozen=True):
    """Time passes: look for phases that last too long. ``heard`` is when each replica was last
    heard of, by chunk or heartbeat."""

    heard: dict[str, float]


class RequestFailed(msgspec.Struct, frozen=True):
    """Argument of the ``fail`` job: tell the client."""

    request_id: str
    code: FailureCode
    detail: str
    retry_after_s: float


IngressEvent = (
    Arrived | RouteReply | Acknowledged | TakenOver | LeaderHeard | AttemptLost | ReplicaRestarted
    | Reconnected | Finished | ClientGone | StaleChunk | Sweep
)  # fmt: skip
