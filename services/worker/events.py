"""What the worker's core says to its engines, and what it hears from them.

The core names each job of ``Start`` below; whoever drives it (the data plane in production, the
simulator in virtual time) performs the job and answers with the event noted beside it, or with
EngineBroken. ``admit``, ``abort`` and ``expect`` are cheap and are done at once, in order; the
others may take their time.
"""

import msgspec

from services.worker.engine.interface import EngineLoad
from shared.messages.base import Message
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import Shares
from shared.messages.requests import FailureCode, SubmitRequest
from shared.placement.copies import Copy

START_ENGINE = "start_engine"  # EngineStart    -> EngineReady | EngineBroken
STOP_ENGINE = "stop_engine"  # EngineStop     -> EngineStopped
ADMIT = "admit"  # Admission      -> nothing, or RequestRefused; in the end RequestsEnded
ABORT = "abort"  # EngineAbort    -> nothing
MEASURE = "measure_engines"  # None           -> EngineLoads
EXPECT = "expect_requests"  # EngineExpect   -> nothing
PAUSE_ENGINE = "pause_engine"  # EnginePause    -> EnginePaused
RESUME_ENGINE = "resume_engine"  # EngineResume   -> nothing
TAKE = "take_requests"  # EngineTake     -> EngineTook
RELEASE = "release_requests"  # EngineRelease  -> EngineReleased if they are kept, else nothing
STAGE = "advance_stage"  # EngineStage    -> EngineStaged
GROW = "grow_cache"  # EngineGrow     -> nothing: what is measured tells


class EngineStart(msgspec.Struct, frozen=True):
    """Build and load the engine, or this worker's rank of it. ``generation`` tells this start from
    others of the replica. The rest as in PrepareReplica; without ``copies`` weights come from disk.
    """

    spec: ReplicaSpec
    generation: int
    rank: int = 0
    epoch: int = 0
    peers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    copies: tuple[Copy, ...] = ()
    stages: int = 1
    cache_bytes_max: int = 0
    verify: bool = False


class EngineExpect(msgspec.Struct, frozen=True):
    """Requests of ``sources`` (replica -> leading worker) will be taken over: their KV cache may
    be copied ahead while they run. Ends with EngineRelease."""

    replica_id: str
    generation: int
    epoch: int
    peers: dict[str, str]
    copies: tuple[Copy, ...]
    sources: dict[str, str]
    shares: Shares
    verify: bool = False


class EnginePause(msgspec.Struct, frozen=True):
    """Stand still at the next step boundary, whatever was admitted by then included. ``shares``
    says who takes each request over."""

    replica_id: str
    generation: int
    shares: Shares = msgspec.field(default_factory=Shares)


class EngineResume(msgspec.Struct, frozen=True):
    replica_id: str
    generation: int


class EngineTake(msgspec.Struct, frozen=True):
    """Take over this replica's share of the paused sources' requests, and hold them."""

    replica_id: str
    generation: int
    epoch: int
    sources: dict[str, str]
    peers: dict[str, str]
    shares: Shares


class EngineRelease(msgspec.Struct, frozen=True):
    """Let the requests taken for ``epoch`` go on, or forget them (``keep`` False)."""

    replica_id: str
    generation: int
    epoch: int
    keep: bool


class EngineStage(msgspec.Struct, frozen=True):
    """Fetch the weights of ``stage``, or free those of ``layers``."""

    replica_id: str
    generation: int
    stage: int
    layers: tuple[int, int]


class EngineGrow(msgspec.Struct, frozen=True):
    """Give the KV cache its full size."""

    replica_id: str
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
    """``bytes_by_source`` and ``took_s`` as in ReplicaPrepared; ``cache_bytes``: this rank's KV
    cache, and what it can grow to."""

    replica_id: str
    generation: int
    bytes_by_source: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    took_s: float = 0.0
    cache_bytes: int = 0
    cache_bytes_full: int = 0


class EngineBroken(Message, frozen=True, kw_only=True):
    """The engine could not start, or failed in a step; whoever reports it has closed it."""

    replica_id: str
    generation: int
    detail: str


class EngineStopped(Message, frozen=True, kw_only=True):
    replica_id: str
    generation: int


class LiveAttempt(Message, frozen=True, kw_only=True):
    """An attempt at a request, where its chunks go, and under which key its engine has it."""

    request_id: str
    attempt: int
    ingress_id: str
    key: str


class EnginePaused(Message, frozen=True, kw_only=True):
    """It stands still. ``moving``: request_id -> the leader that takes it over; what is submitted
    from now on is not among them."""

    replica_id: str
    generation: int
    moving: dict[str, str] = msgspec.field(default_factory=dict[str, str])


class EngineTook(Message, frozen=True, kw_only=True):
    """The requests are held here now, or ``failure`` says why none is. The rest as in
    RequestsTaken."""

    replica_id: str
    generation: int
    epoch: int
    taken: tuple[LiveAttempt, ...] = ()
    moved: int = 0
    replayed: int = 0
    bytes_by_source: dict[str, dict[str, int]] = msgspec.field(
        default_factory=dict[str, dict[str, int]]
    )
    ahead_bytes: int = 0
    bytes_needed: int = 0
    took_s: float = 0.0
    detail: str = ""
    failure: str = ""


class EngineReleased(Message, frozen=True, kw_only=True):
    """The requests taken have gone on, for a step. ``pauses`` as in ReplicaStarted."""

    replica_id: str
    generation: int
    epoch: int
    pauses: tuple[tuple[float, int], ...] = ()


class EngineStaged(Message, frozen=True, kw_only=True):
    replica_id: str
    generation: int
    stage: int
    bytes_by_source: dict[str, int] = msgspec.field(default_factory=dict[str, int])


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
    cache_tokens: int = 0  # of live requests, in the KV cache
    fetched_bytes: int = 0  # from elsewhere, by a preparation under way, or the last one
    cache_bytes: int = 0  # of this rank's KV cache; 0 where it never changes


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
