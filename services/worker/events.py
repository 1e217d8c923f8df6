"""What the worker's core says to its engines, and what it hears from them.

The core names each job of ``Start`` below; whoever drives it (the data plane in production, the
simulator in virtual time) performs the job and answers with the event noted beside it. ``admit``
and ``abort`` are cheap and are done at once, in order; the others may take their time.
"""

import msgspec

from services.worker.engine.interface import EngineLoad
from shared.messages.base import Message
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import FailureCode, SubmitRequest

START_ENGINE = "start_engine"  # EngineStart    -> EngineReady | EngineBroken
STOP_ENGINE = "stop_engine"  # EngineStop     -> EngineStopped
ADMIT = "admit"  # Admission      -> nothing, or RequestRefused; in the end RequestsEnded
ABORT = "abort"  # EngineAbort    -> nothing
MEASURE = "measure_engines"  # None           -> EngineLoads


class EngineStart(msgspec.Struct, frozen=True):
    """Build and load the engine. ``generation`` tells this start from others of the replica."""

    spec: ReplicaSpec
    generation: int


class EngineStop(msgspec.Struct, frozen=True):
    """Drop what runs and free the memory, even if the engine is still starting."""

    replica_id: str
    generation: int


class Admission(msgspec.Struct, frozen=True):
    """Give the request to the engine under ``key``."""

    key: str
    request: SubmitRequest


class EngineAbort(msgspec.Struct, frozen=True):
    """Forget the request; no chunk of it may be sent from now on."""

    replica_id: str
    key: str


class EngineReady(Message, frozen=True, kw_only=True):
    replica_id: str
    generation: int


class EngineBroken(Message, frozen=True, kw_only=True):
    """The engine could not start, or failed in a step; whoever reports it has closed it."""

    replica_id: str
    generation: int
    detail: str


class EngineStopped(Message, frozen=True, kw_only=True):
    replica_id: str
    generation: int


class RequestRefused(Message, frozen=True, kw_only=True):
    """The engine does not take the attempt: its bounds are known only between two steps."""

    request_id: str
    attempt: int
    failure: FailureCode
    detail: str


class EndedAttempt(Message, frozen=True, kw_only=True):
    request_id: str
    attempt: int


class RequestsEnded(Message, frozen=True, kw_only=True):
    """These attempts got their last chunk from the engine; the chunks are on their way."""

    ended: tuple[EndedAttempt, ...]


class MeasuredEngine(Message, frozen=True, kw_only=True):
    """Load of one engine. ``stalled``: its current step has taken longer than step_stall_s."""

    replica_id: str
    generation: int
    load: EngineLoad
    running_max: int = 0
    waiting_max: int = 0
    output_tokens_total: int = 0
    requests_total: int = 0
    step_s: float = 0.0
    stalled: bool = False


class EngineLoads(Message, frozen=True, kw_only=True):
    engines: tuple[MeasuredEngine, ...]


class ReplicaReportTick(Message, frozen=True, kw_only=True):
    """Timer: measure the engines, then report and send heartbeats."""


class WorkerReportTick(Message, frozen=True, kw_only=True):
    """Timer: say who we are and what we host."""


class DrainDeadline(Message, frozen=True, kw_only=True):
    """Timer: what still runs on this replica has to be handed back. ``at_s`` tells it from timers
    of other drains of the replica."""

    replica_id: str
    generation: int
    at_s: float
