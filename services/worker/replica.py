"""What the worker's core remembers of one replica that it hosts."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from services.worker.events import EngineTook, MeasuredEngine
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    HostedReplica,
    PrepareReplica,
    ReplicaPhase,
    ReplicaReport,
)
from shared.messages.requests import FailureCode, FinishReason, TokenChunk

EngineState = Literal["none", "starting", "ready", "stopping"]


class LiveRequest(msgspec.Struct, frozen=True):
    """The attempt of a request that runs here. ``key`` names it to the engine."""

    request_id: str
    attempt: int
    ingress_id: str
    replica_id: str
    key: str


@dataclass(slots=True, kw_only=True, eq=False)
class Moves:
    """Where a replica stands in a switch that it takes part in. Every number is an epoch, 0 for
    none, except ``stage`` and ``staging``.

    The side that gives: ``pausing`` until it stands still, then ``moving`` says who takes which
    request over. The side that takes: ``expecting``, ``taking``, ``taken`` with the attempts in
    ``held``, and ``releasing`` until they go on.
    """

    order: PrepareReplica | None = None  # the last one obeyed, done or not
    prepared: int = 0
    bytes_by_source: dict[str, int] = field(default_factory=dict[str, int])
    took_s: float = 0.0
    stage: int = 0  # done
    staging: int = 0  # under way, 0 for none
    pausing: int = 0
    paused_s: float = 0.0  # since when it stands still
    moving: dict[str, str] = field(default_factory=dict[str, str])
    expecting: int = 0  # KV cache may be copied ahead
    taking: int = 0
    taken: int = 0
    took: EngineTook | None = None
    held: dict[str, LiveRequest] = field(default_factory=dict[str, LiveRequest])
    releasing: int = 0
    pauses: tuple[tuple[float, int], ...] = ()  # of what was let go on when it was last started

    def stage_missing(self, phase: ReplicaPhase) -> bool:
        """Whether part of its weights is not here: not fetched yet, or freed for those who come."""
        if phase == "prepared":
            return self.order is not None and self.stage < self.order.stages - 1
        return phase == "paused" and (self.stage > 0 or self.staging > 0)

    def check(self, phase: ReplicaPhase) -> None:
        assert not (self.taking and self.taken), self
        assert not self.taken or self.took is not None, self
        assert not self.held or self.taken, self
        assert not (self.taking or self.taken) or phase in {"prepared", "serving"}, (phase, self)
        assert not self.releasing or phase == "serving", (phase, self)
        assert not self.pausing or phase == "serving", (phase, self)
        assert not self.moving or phase == "paused", (phase, self)
        assert not self.staging or phase in {"prepared", "paused"}, (phase, self)
        assert phase != "prepared" or self.prepared, self


@dataclass(slots=True, kw_only=True, eq=False)
class Hosted:
    """A replica, or this worker's rank of one. ``works``: it has an engine here, or a part of one;
    rank 0 always has, and takes the requests.

    ``serve_epoch`` is the epoch at which it was last told to start or resume: within one epoch
    a drain or a pause always comes before that, so one of the same epoch is a late copy.
    """

    spec: ReplicaSpec
    rank: int
    works: bool
    epoch: int
    serve_epoch: int = -1
    generation: int = 0  # of its engine
    phase: ReplicaPhase = "failed"  # until it is told to serve
    engine: EngineState = "none"
    detail: str = ""
    drain_deadline_s: float | None = None
    drained: bool = False
    handed_back: int = 0
    peers: dict[str, str] = field(default_factory=dict[str, str])  # where its other workers are
    cache_bytes: int = 0  # of this rank's KV cache when its engine was ready
    cache_bytes_full: int = 0  # what it can grow to
    heartbeat_s: float = float("-inf")  # when the last heartbeats were sent
    measured: MeasuredEngine | None = None
    told: ReplicaReport | None = None  # the last report sent, and when
    told_s: float = float("-inf")
    live: dict[str, LiveRequest] = field(default_factory=dict[str, LiveRequest])
    ingresses: dict[str, int] = field(default_factory=dict[str, int])  # live requests of each
    moves: Moves = field(default_factory=Moves)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def worker_id(self) -> str:
        """Ours."""
        return self.spec.gpus[self.rank]

    @property
    def lacks_layers(self) -> bool:
        """Whether part of its weights is not here. Only rank 0 is told of stages, and has the
        others fetch and free theirs: it knows for all of them."""
        return self.leads and self.moves.stage_missing(self.phase)

    @property
    def replica_id(self) -> str:
        return self.spec.replica_id

    def admit(self, request: LiveRequest) -> None:
        self.live[request.request_id] = request
        self.ingresses[request.ingress_id] = self.ingresses.get(request.ingress_id, 0) + 1

    def forget(self, request: LiveRequest) -> None:
        del self.live[request.request_id]
        self.moves.moving.pop(request.request_id, None)
        left = self.ingresses[request.ingress_id] - 1
        if left:
            self.ingresses[request.ingress_id] = left
        else:
            del self.ingresses[request.ingress_id]

    def check(self) -> None:
        assert self.works or self.engine == "none", self
        assert self.works or not self.leads, self
        if self.works and self.phase in {"serving", "prepared", "paused"}:
            assert self.engine == "ready", self
        assert self.phase not in {"starting", "preparing"} or self.engine == "starting", self
        assert self.phase != "failed" or self.engine == "none", self
        assert self.phase != "paused" or self.leads, self
        assert not self.live or self.engine == "ready", self
        assert not self.live or self.phase in {"serving", "paused", "draining"}, self
        assert not (self.drained and self.live), self
        assert self.drained <= (self.phase == "draining"), self
        assert self.moves.moving.keys() <= self.live.keys(), self
        counted: dict[str, int] = {}
        for request in self.live.values():
            assert request.replica_id == self.replica_id, request
            counted[request.ingress_id] = counted.get(request.ingress_id, 0) + 1
        assert counted == self.ingresses, self
        self.moves.check(self.phase)

    def snapshot(self) -> HostedReplica:
        moves, measured = self.moves, self.measured
        return HostedReplica(
            replica_id=self.replica_id,
            epoch=self.epoch,
            phase=self.phase,
            parallelism=self.spec.parallelism,
            rank=self.rank,
            detail=self.detail,
            model_id=self.spec.model_id,
            prepared=moves.prepared,
            taken=moves.taken or moves.releasing,  # until the first step after the release
            stage=moves.stage,
            fetched_bytes=max(
                sum(n for source, n in moves.bytes_by_source.items() if source != self.worker_id),
                measured.fetched_bytes if measured is not None else 0,
            ),
            cache_tokens=measured.cache_tokens if measured is not None else 0,
            cache_bytes=(measured.cache_bytes if measured else 0) or self.cache_bytes,
            cache_bytes_full=self.cache_bytes_full,
            stage_layers=moves.order.stage_layers if moves.order is not None else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How attempts end that the engine does not end itself."""

    finish: FinishReason
    failure: FailureCode
    detail: str

    def chunk(self, *, request_id: str, attempt: int) -> TokenChunk:
        return TokenChunk(
            request_id=request_id,
            attempt=attempt,
            finish=self.finish,
            failure=self.failure,
            detail=self.detail,
        )
