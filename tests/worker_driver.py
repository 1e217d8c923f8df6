"""Drives a worker's core by hand, with modelled engines, in a time that the test moves."""

import heapq
from collections import Counter
from itertools import count
from typing import Any, TypeVar

from services.worker.config import WorkerConfig
from services.worker.core import WorkerCore
from services.worker.engine.interface import EngineRequest
from services.worker.engine.modelled import ModelledEngine
from services.worker.events import (
    ABORT,
    ADMIT,
    MEASURE,
    START_ENGINE,
    STOP_ENGINE,
    Admission,
    EndedAttempt,
    EngineBroken,
    EngineLoads,
    EngineReady,
    EngineStart,
    EngineStop,
    EngineStopped,
    MeasuredEngine,
    RequestRefused,
    RequestsEnded,
)
from services.worker.identity import WorkerIdentity
from shared.core import Log, Publish, SetTimer, Start, Started
from shared.errors import Rejected
from shared.hardware import GpuSpec
from shared.mesh import ModelledEngineSettings
from shared.messages.base import DataMessage, Message
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import StartReplica
from shared.messages.requests import SamplingParams, SubmitRequest, TokenChunk, TokenChunks

WORKER = "n0-g0"
SETTINGS = ModelledEngineSettings(running_max=4, waiting_max=4, batch_tokens_max=64, kv_blocks=64)
IDENTITY = WorkerIdentity(
    worker_id=WORKER,
    incarnation="run-1",
    node_id="n0",
    gpu=GpuSpec(gpu_id=WORKER),
    models=("tiny",),
)
T = TypeVar("T", bound=Message | DataMessage)


def spec(
    replica_id: str = "r1", *gpus: str, parallelism: str = "tp1pp1", model_id: str = "tiny"
) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id,
        model_id=model_id,
        parallelism=parallelism,
        gpus=gpus or (WORKER,),
    )


def start(epoch: int = 1, replica: ReplicaSpec | None = None) -> StartReplica:
    return StartReplica(epoch=epoch, worker_id=WORKER, replica=replica or spec())


def submit(
    request_id: str = "a", attempt: int = 0, *, replica_id: str = "r1", tokens: int = 5
) -> SubmitRequest:
    return SubmitRequest(
        request_id=request_id,
        attempt=attempt,
        ingress_id="i" + request_id[-1],
        epoch=1,
        replica_id=replica_id,
        prompt_tokens=[65, 66, 67],
        sampling=SamplingParams(output_tokens_max=tokens),
    )


class DrivenWorker:
    """``sent`` is what the core published since it was last cleared. ``jobs`` are starts and
    stops of engines that the test has not let come to an end yet."""

    def __init__(self, config: WorkerConfig | None = None) -> None:
        self.config = config or WorkerConfig(worker_id=WORKER)
        self.core = WorkerCore(self.config, IDENTITY)
        self.now_s = 0.0
        self.sent: list[Message | DataMessage] = []
        self.jobs: list[EngineStart | EngineStop] = []
        self.engines: dict[tuple[str, int], ModelledEngine] = {}
        self.admitted: Counter[str] = Counter()
        self.ended: Counter[tuple[str, int]] = Counter()
        self.stalled = False
        self._timers: list[tuple[float, int, Message]] = []
        self._order = count()
        self._generations: dict[str, int] = {}
        self.feed(Started())

    def feed(self, event: Any) -> list[Message | DataMessage]:
        """Step the core, perform the effects; what it published."""
        before = len(self.sent)
        for effect in self.core.step(event, self.now_s):
            match effect:
                case Publish(message=message):
                    self._note(message)
                case SetTimer(at_s=at_s, event=timer):
                    heapq.heappush(self._timers, (at_s, next(self._order), timer))
                case Start(job=job, argument=argument):
                    self._perform(job, argument)
                case Log():
                    pass
                case _:
                    raise AssertionError(effect)
        self.core.check()
        return self.sent[before:]

    def advance(self, seconds: float) -> list[Message | DataMessage]:
        """Let time pass, timers included; what was published meanwhile."""
        before, until_s = len(self.sent), self.now_s + seconds
        while self._timers and self._timers[0][0] <= until_s:
            at_s, _, event = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, at_s)
            self.feed(event)
        self.now_s = until_s
        return self.sent[before:]

    def settle_jobs(self) -> list[Message | DataMessage]:
        """Let every start and stop come to its end."""
        before = len(self.sent)
        while self.jobs:
            job = self.jobs.pop(0)
            if isinstance(job, EngineStart):
                key = (job.spec.replica_id, job.generation)
                if not any(_stops(other, key) for other in self.jobs):
                    self.engines[key] = ModelledEngine(SETTINGS, context_tokens_max=512)
                    self.feed(EngineReady(replica_id=key[0], generation=key[1]))
            else:
                self.engines.pop((job.replica_id, job.generation), None)
                self.feed(EngineStopped(replica_id=job.replica_id, generation=job.generation))
        return self.sent[before:]

    def break_engine(self, detail: str) -> list[Message | DataMessage]:
        (replica_id, generation), _ = self.engines.popitem()
        event = EngineBroken(replica_id=replica_id, generation=generation, detail=detail)
        return self.feed(event)

    def step_engines(self) -> None:
        for engine in list(self.engines.values()):
            ended: list[EndedAttempt] = []
            for chunk in engine.step().chunks:
                if chunk.finish is not None:
                    request_id, _, attempt = chunk.key.rpartition("/")
                    self.ended[request_id, int(attempt)] += 1
                    ended.append(EndedAttempt(request_id=request_id, attempt=int(attempt)))
            engine.check()
            if ended:
                self.feed(RequestsEnded(ended=tuple(ended)))

    def serve(self, replica: ReplicaSpec | None = None, *, epoch: int = 1) -> None:
        self.feed(start(epoch, replica))
        self.settle_jobs()
        self.sent.clear()

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.sent if isinstance(message, kind)]

    def chunks(self) -> list[TokenChunk]:
        return [chunk for message in self.of(TokenChunks) for chunk in message.chunks]

    def _note(self, message: Message | DataMessage) -> None:
        self.sent.append(message)
        if isinstance(message, TokenChunks):
            for chunk in message.chunks:
                self.ended[chunk.request_id, chunk.attempt] += chunk.finish is not None

    def _perform(self, job: str, argument: Any) -> None:
        match job:
            case _ if job in (START_ENGINE, STOP_ENGINE):
                self.jobs.append(argument)
                if job == START_ENGINE:
                    self._generations[argument.spec.replica_id] = argument.generation
            case _ if job == ADMIT:
                self._admit(argument)
            case _ if job == ABORT:
                engine = self.engines[argument.replica_id, self._generations[argument.replica_id]]
                assert engine.abort(argument.key), "aborts what the engine does not have"
            case _ if job == MEASURE:
                self.feed(EngineLoads(engines=tuple(self._measured())))
            case _:
                raise AssertionError(job)

    def _admit(self, admission: Admission) -> None:
        request = admission.request
        self.admitted[admission.key] += 1
        engine = self.engines[request.replica_id, self._generations[request.replica_id]]
        try:
            engine.add(
                EngineRequest(
                    key=admission.key,
                    prompt_tokens=request.prompt_tokens,
                    sampling=request.sampling,
                    output_tokens=request.output_tokens,
                )
            )
        except Rejected as rejected:
            refused = RequestRefused(
                request_id=request.request_id,
                attempt=request.attempt,
                failure="overloaded" if rejected.code == "overloaded" else "invalid",
                detail=rejected.detail,
            )
            heapq.heappush(self._timers, (self.now_s, next(self._order), refused))

    def _measured(self) -> list[MeasuredEngine]:
        return [
            MeasuredEngine(
                replica_id=replica_id,
                generation=generation,
                load=engine.load(),
                stalled=self.stalled,
            )
            for (replica_id, generation), engine in self.engines.items()
        ]


def _stops(job: EngineStart | EngineStop, key: tuple[str, int]) -> bool:
    return isinstance(job, EngineStop) and (job.replica_id, job.generation) == key
