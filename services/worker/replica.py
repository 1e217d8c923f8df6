"""What the worker's core remembers of one replica that it hosts."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from services.worker.events import MeasuredEngine
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import HostedReplica, ReplicaPhase, ReplicaReport
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
class Hosted:
    """A replica, or this worker's rank of one. Only rank 0 has an engine here.

    ``serve_epoch`` is the epoch at which it was last told to start or resume: within one epoch a
    drain always comes before that, so a drain of the same epoch is a late copy.
    """

    spec: ReplicaSpec
    rank: int
    epoch: int
    serve_epoch: int
    generation: int = 0  # of its engine
    phase: ReplicaPhase = "failed"  # until it is told to serve
    engine: EngineState = "none"
    detail: str = ""
    drain_deadline_s: float | None = None
    drained: bool = False
    handed_back: int = 0
    heartbeat_s: float = float("-inf")  # when the last heartbeats were sent
    measured: MeasuredEngine | None = None
    told: ReplicaReport | None = None  # the last report sent, and when
    told_s: float = float("-inf")
    live: dict[str, LiveRequest] = field(default_factory=dict[str, LiveRequest])
    ingresses: dict[str, int] = field(default_factory=dict[str, int])  # live requests of each

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def admit(self, request: LiveRequest) -> None:
        self.live[request.request_id] = request
        self.ingresses[request.ingress_id] = self.ingresses.get(request.ingress_id, 0) + 1

    def forget(self, request: LiveRequest) -> None:
        del self.live[request.request_id]
        left = self.ingresses[request.ingress_id] - 1
        if left:
            self.ingresses[request.ingress_id] = left
        else:
            del self.ingresses[request.ingress_id]

    def check(self) -> None:
        assert self.leads or self.engine == "none", self
        assert self.phase != "serving" or not self.leads or self.engine == "ready", self
        assert self.phase != "starting" or self.engine == "starting", self
        assert self.phase != "failed" or self.engine == "none", self
        assert not self.live or (self.engine == "ready" and self.phase != "failed"), self
        assert not (self.drained and self.live), self
        assert self.drained <= (self.phase == "draining"), self
        counted: dict[str, int] = {}
        for request in self.live.values():
            assert request.replica_id == self.spec.replica_id, request
            counted[request.ingress_id] = counted.get(request.ingress_id, 0) + 1
        assert counted == self.ingresses, self

    def snapshot(self) -> HostedReplica:
        return HostedReplica(
            replica_id=self.spec.replica_id,
            epoch=self.epoch,
            phase=self.phase,
            parallelism=self.spec.parallelism,
            rank=self.rank,
            detail=self.detail,
            model_id=self.spec.model_id,
        )


class Settled:
    """The newest attempt of each recent request that must not run here any more: it ended, was
    refused, or was aborted, perhaps before its submission arrived. Bounded: the oldest go."""

    def __init__(self, settled_max: int) -> None:
        self._max = settled_max
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, request_id: str, attempt: int) -> None:
        known = self._attempts.get(request_id, -1)
        if attempt > known:
            self._attempts[request_id] = attempt
            if len(self._attempts) > self._max:
                self._attempts.popitem(last=False)

    def covers(self, request_id: str, attempt: int) -> bool:
        return attempt <= self._attempts.get(request_id, -1)


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
