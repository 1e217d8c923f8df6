"""Drives a worker's core by hand, with modelled engines, in a time that the test moves."""

import heapq
from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

import msgspec

from services.worker.config import WorkerConfig
from services.worker.core import WorkerCore
from services.worker.engine.interface import EngineRequest
from services.worker.engine.modelled import ModelledEngine
from services.worker.events import (
    ABORT,
    ADMIT,
    EXPECT,
    GROW,
    MEASURE,
    PAUSE_ENGINE,
    RELEASE,
    RESUME_ENGINE,
    STAGE,
    START_ENGINE,
    STOP_ENGINE,
    TAKE,
    Admission,
    EndedAttempt,
    EngineAbort,
    EngineBroken,
    EngineExpect,
    EngineGrow,
    EngineLoads,
    EnginePause,
    EnginePaused,
    EngineReady,
    EngineRelease,
    EngineReleased,
    EngineResume,
    EngineStage,
    EngineStaged,
    EngineStart,
    EngineStop,
    EngineStopped,
    EngineTake,
    EngineTook,
    LiveAttempt,
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
from shared.messages.replicas import PrepareReplica, Shares, StartReplica
from shared.messages.requests import (
    AbortRequest,
    SamplingParams,
    SubmitRequest,
    TokenChunk,
    TokenChunks,
)
from shared.placement.spread import target_of
from shared.subjects import ABORT_REQUEST

WORKER = "n0-g0"
SETTINGS = ModelledEngineSettings(running_max=4, waiting_max=4, batch_tokens_max=64, kv_blocks=64)
IDENTITY = WorkerIdentity(
    worker_id=WORKER,
    incarnation="run-1",
    node_id="n0",
    gpu=GpuSpec(gpu_id=WORKER),
    models=("tiny",),
)
SWITCH_JOBS = (PAUSE_ENGINE, RESUME_ENGINE, TAKE, RELEASE, STAGE)
SwitchJob = EnginePause | EngineResume | EngineTake | EngineRelease | EngineStage
Job = EngineStart | EngineStop | SwitchJob
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


def prepare(
    epoch: int = 2,
    replica: ReplicaSpec | None = None,
    *,
    source: tuple[str, str] | None = None,
    stages: int = 1,
) -> PrepareReplica:
    """``source``: a replica whose requests it will take, and that replica's leader."""
    replica = replica or spec("r2")
    return PrepareReplica(
        epoch=epoch,
        worker_id=replica.gpus[0],
        replica=replica,
        sources=dict([source]) if source else {},
        shares=shares(replica),
        stages=stages,
    )


def shares(target: ReplicaSpec) -> Shares:
    """Everything goes to ``target``."""
    return Shares(rows={"*": {target.replica_id: 1.0}}, leaders={target.replica_id: target.gpus[0]})


class DrivenWorker:
    """``sent`` is what the core published since it was last cleared. ``jobs`` are those of its
    engines that the test has not let come to an end yet. Workers with the same ``mesh`` reach each
    other."""

    def __init__(
        self,
        config: WorkerConfig | None = None,
        *,
        worker_id: str = WORKER,
        followers: bool = False,
        mesh: "dict[str, DrivenWorker] | None" = None,
    ) -> None:
        self.config = config or WorkerConfig(worker_id=worker_id)
        identity = replace(IDENTITY, worker_id=worker_id, followers=followers)
        self.core = WorkerCore(self.config, identity)
        self.mesh = {} if mesh is None else mesh
        self.mesh[worker_id] = self
        self.now_s = 0.0
        self.sent: list[Message | DataMessage] = []
        self.jobs: list[Job] = []
        self.expected: list[EngineExpect] = []
        self.grown: list[EngineGrow] = []
        self.engines: dict[tuple[str, int], ModelledEngine] = {}
        self.admitted: Counter[str] = Counter()
        self.ended: Counter[tuple[str, int]] = Counter()
        self.stalled = False
        self._still: dict[tuple[str, int], list[Admission]] = {}  # paused, with what waits
        self._refused: set[str] = set()
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
                    if isinstance(message, AbortRequest):
                        self._forward(effect.subject, message)
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

    def settle_jobs(self, jobs_max: int = 1000) -> list[Message | DataMessage]:
        """Let what the engines were told come to its end."""
        before = len(self.sent)
        while self.jobs and jobs_max:
            jobs_max -= 1
            self._settle(self.jobs.pop(0))
        return self.sent[before:]

    def _settle(self, job: "Job") -> None:
        if isinstance(job, EngineStart):
            key = (job.spec.replica_id, job.generation)
            if not any(isinstance(other, EngineStop) and _key(other) == key for other in self.jobs):
                if not job.rank:
                    self.engines[key] = ModelledEngine(SETTINGS, context_tokens_max=512)
                self.feed(EngineReady(replica_id=key[0], generation=key[1]))
            return
        key = _key(job)
        if isinstance(job, EngineStop):
            self.engines.pop(key, None)
            self._still.pop(key, None)
            self.feed(EngineStopped(replica_id=key[0], generation=key[1]))
        elif key in self.engines:
            self._switch(job, self.engines[key])

    def _switch(self, job: "SwitchJob", engine: ModelledEngine) -> None:
        key = _key(job)
        names: dict[str, Any] = {"replica_id": job.replica_id, "generation": job.generation}
        match job:
            case EnginePause():
                self._still.setdefault(key, [])
                moving = {
                    request_id: job.shares.leaders[target]
                    for request_id, target in _targets(engine, job.shares)
                    if target in job.shares.leaders
                }
                self.feed(EnginePaused(moving=moving, **names))
            case EngineResume():
                for admission in self._still.pop(key, []):
                    self._add(engine, admission)
            case EngineTake():
                self.feed(self._take(job, engine))
            case EngineRelease(keep=keep):
                engine.release(keep=keep)
                if keep:
                    self.feed(EngineReleased(epoch=job.epoch, pauses=((0.1, 1),), **names))
            case EngineStage():
                engine.advance_stage(job.stage, job.layers)
                staged = EngineStaged(stage=job.stage, bytes_by_source={"n0-g1": 5}, **names)
                self.feed(staged)

    def _take(self, job: EngineTake, engine: ModelledEngine) -> EngineTook:
        took = EngineTook(replica_id=job.replica_id, generation=job.generation, epoch=job.epoch)
        taken: list[LiveAttempt] = []
        for replica_id, worker_id in job.sources.items():
            source = self.mesh[worker_id].standing(replica_id)
            if source is None:
                engine.release(keep=False)
                return msgspec.structs.replace(took, failure=f"{replica_id} does not stand still")
            ours = {r for r, target in _targets(source, job.shares) if target == job.replica_id}
            states = [s for s in source.states() if _attempt(s.request.key)[0] in ours]
            done = engine.take(replica_id, states, final=True)
            for request_id, attempt in map(_attempt, done.moved + done.replayed):
                taken.append(
                    LiveAttempt(
                        request_id=request_id,
                        attempt=attempt,
                        ingress_id="i" + request_id[-1],
                        key=f"{request_id}/{attempt}",
                    )
                )
        return msgspec.structs.replace(took, taken=tuple(taken), moved=len(taken))

    def standing(self, replica_id: str) -> ModelledEngine | None:
        """Its engine, if that stands still."""
        key = (replica_id, self._generations.get(replica_id, 0))
        return self.engines.get(key) if key in self._still else None

    def break_engine(self, detail: str) -> list[Message | DataMessage]:
        (replica_id, generation), _ = self.engines.popitem()
        self._still.pop((replica_id, generation), None)
        event = EngineBroken(replica_id=replica_id, generation=generation, detail=detail)
        return self.feed(event)

    def step_engines(self) -> None:
        for key, engine in list(self.engines.items()):
            if key in self._still:
                continue
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

    def _forward(self, subject: str, abort: AbortRequest) -> None:
        for worker_id, worker in self.mesh.items():
            if subject == ABORT_REQUEST.of(worker_id=worker_id).pattern and worker is not self:
                worker.feed(abort)

    def _perform(self, job: str, argument: Any) -> None:
        match job:
            case _ if job == ADMIT:
                self._admit(argument)
            case _ if job == ABORT:
                self._abort(argument)
            case _ if job == MEASURE:
                self.feed(EngineLoads(engines=tuple(self._measured())))
            case _ if job == EXPECT:
                self.expected.append(argument)
            case _ if job == GROW:
                self.grown.append(argument)
            case _:
                assert job in SWITCH_JOBS or job in {START_ENGINE, STOP_ENGINE}, job
                self.jobs.append(argument)
                if job == START_ENGINE:
                    self._generations[argument.spec.replica_id] = argument.generation

    def _abort(self, abort: EngineAbort) -> None:
        key = (abort.replica_id, self._generations[abort.replica_id])
        for admission in self._still.get(key, []):
            if admission.key == abort.key:
                self._still[key].remove(admission)
                return
        known = self.engines[key].abort(abort.key) or abort.key in self._refused
        assert known, "aborts what the engine does not have"

    def _admit(self, admission: Admission) -> None:
        self.admitted[admission.key] += 1
        key = (admission.request.replica_id, self._generations[admission.request.replica_id])
        if key in self._still:
            self._still[key].append(admission)
        else:
            self._add(self.engines[key], admission)

    def _add(self, engine: ModelledEngine, admission: Admission) -> None:
        request = admission.request
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
            self._refused.add(admission.key)
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


def _key(job: "EngineStop | SwitchJob") -> tuple[str, int]:
    return job.replica_id, job.generation


def _attempt(key: str) -> tuple[str, int]:
    request_id, _, attempt = key.rpartition("/")
    return request_id, int(attempt)


def _targets(engine: ModelledEngine, wanted: Shares) -> list[tuple[str, str]]:
    """Each live request, and the replica that takes it over."""
    ids = [_attempt(state.request.key)[0] for state in engine.states()]
    return [(request_id, target_of(request_id, -1, wanted.rows)) for request_id in ids]
