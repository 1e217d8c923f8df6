"""What the ingress core hears besides route replies, and what it hands to its ``fail`` job."""

from dataclasses import dataclass
from typing import Literal

from services.ingress.journey import Journey
from shared.messages.requests import FailureCode, FinishReason, RouteReply

LossReason = Literal["refused", "failed", "stalled", "gap", "incarnation", "unacknowledged"]


@dataclass(frozen=True, slots=True)
class Arrived:
    journey: Journey


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The replica took this attempt, or sent its first sign of life for it."""

    request_id: str
    attempt: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class AttemptLost:
    request_id: str
    attempt: int
    reason: LossReason
    failure: FailureCode | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaRestarted:
    """The replica is led by another run of a worker: what the former run had is lost."""

    replica_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The broker is back: what was said meanwhile is lost, perhaps the last word of a stream."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last token was taken."""

    request_id: str
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class ClientGone:
    request_id: str


@dataclass(frozen=True, slots=True)
class StaleChunk:
    """A chunk of an attempt that we gave up: its worker should stop."""

    request_id: str
    attempt: int
    replica_id: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Time passes: look for phases that last too long. ``heard`` is when each replica was last
    heard of, by chunk or heartbeat."""

    heard: dict[str, float]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Argument of the ``fail`` job: tell the client."""

    request_id: str
    code: FailureCode
    detail: str
    retry_after_s: float


IngressEvent = (
    Arrived | RouteReply | Acknowledged | AttemptLost | ReplicaRestarted | Reconnected | Finished
    | ClientGone | StaleChunk | Sweep
)  # fmt: skip
