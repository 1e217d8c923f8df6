"""The engines of one worker in virtual time: the jobs of services/worker/events.py.

Tokens are a function of (request, position), so that the client can tell a lost, repeated or
foreign token from the right one, whichever replica made it.
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from loadgen.simulator.process import Job, Port
from services.worker.engine.interface import EngineLoad
from services.worker.events import (
    ABORT,
    ADMIT,
    MEASURE,
    START_ENGINE,
    STOP_ENGINE,
    Admission,
    EndedAttempt,
    EngineAbort,
    EngineBroken,
    EngineLoads,
    EngineReady,
    EngineStart,
    EngineStop,
    EngineStopped,
    MeasuredEngine,
    RequestsEnded,
)
from shared.messages.requests import SubmitRequest, TokenChunk, TokenChunks
from shared.subjects import TOKEN_CHUNKS


def token_at(request_id: str, position: int) -> int:
    """The one right token of a request at a position."""
    return zlib.crc32(f"{request_id}/{position}".encode()) % 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    start_s_max: float = 0.5
    stop_s: float = 0.05
    step_s: float = 0.05
    start_fails: float = 0.0  # chance that an engine cannot start
    start_hangs: float = 0.0  # chance that it neither starts nor fails
    step_breaks: float = 0.0  # chance that a step breaks the engine


@dataclass(slots=True)
class _Run:
    request: SubmitRequest
    position: int


@dataclass(slots=True)
class _Engine:
    replica_id: str
    generation: int
    ready: bool = False
    stepping: bool = False
    broken: bool = False
    runs: dict[str, _Run] = field(default_factory=dict[str, _Run])


class Engines:
    """Everything slow that one worker process does."""

    RUNNING_MAX, WAITING_MAX, KV_BLOCKS = 64, 64, 1024

    def __init__(
        self, port: Port, *, incarnation: str, times: EngineTimes, rng: random.Random
    ) -> None:
        self._port, self._incarnation = port, incarnation
        self._rng, self.times = rng, times
        self._engines: dict[str, _Engine] = {}

    def jobs(self) -> Mapping[str, Job]:
        return {
            START_ENGINE: self._start,
            STOP_ENGINE: self._stop,
            ADMIT: self._admit,
            ABORT: self._abort,
            MEASURE: self._measure,
        }

    def _start(self, start: EngineStart) -> None:
        engine = _Engine(start.spec.replica_id, start.generation)
        self._engines[engine.replica_id] = engine

        def ready() -> None:
            if self._engines.get(engine.replica_id) is not engine:
                return
            if self._rng.random() < self.times.start_fails:
                self._break(engine, "out of memory while loading weights (injected)")
                return
            engine.ready = True
            self._port.feed(EngineReady(replica_id=engine.replica_id, generation=engine.generation))

        if self._rng.random() < self.times.start_hangs:
            return
        self._port.later(self.times.start_s_max * self._rng.random(), ready)

    def _stop(self, stop: EngineStop) -> None:
        engine = self._engines.get(stop.replica_id)
        if engine is not None and engine.generation == stop.generation:
            del self._engines[stop.replica_id]
        stopped = EngineStopped(replica_id=stop.replica_id, generation=stop.generation)
        self._port.feed(stopped, delay_s=self.times.stop_s)

    def _admit(self, admission: Admission) -> None:
        request = admission.request
        engine = self._engines[request.replica_id]
        if engine.broken:
            return  # the core is about to hear of it, and ends what it has admitted
        assert engine.ready, f"{request.request_id} was admitted to an engine that is not ready"
        engine.runs[admission.key] = _Run(request, len(request.output_tokens))
        self._keep_stepping(engine)

    def _abort(self, abort: EngineAbort) -> None:
        engine = self._engines.get(abort.replica_id)
        if engine is not None:
            engine.runs.pop(abort.key, None)

    def _measure(self, _: None) -> None:
        engines = tuple(
            MeasuredEngine(
                replica_id=engine.replica_id,
                generation=engine.generation,
                load=EngineLoad(running=len(engine.runs), kv_blocks_total=self.KV_BLOCKS),
                running_max=self.RUNNING_MAX,
                waiting_max=self.WAITING_MAX,
                step_s=self.times.step_s,
            )
            for engine in self._engines.values()
            if engine.ready
        )
        self._port.feed(EngineLoads(engines=engines))

    def _keep_stepping(self, engine: _Engine) -> None:
        if engine.runs and not engine.stepping:
            engine.stepping = True
            self._port.later(self.times.step_s, lambda: self._step(engine))

    def _step(self, engine: _Engine) -> None:
        """One token for each running request; one message for each ingress."""
        engine.stepping = False
        if self._engines.get(engine.replica_id) is not engine or not engine.runs:
            return
        if self._rng.random() < self.times.step_breaks:
            self._break(engine, "illegal memory access (injected)")
            return
        chunks: dict[str, list[TokenChunk]] = {}
        ended: list[EndedAttempt] = []
        for key, run in list(engine.runs.items()):
            request, position = run.request, run.position
            run.position += 1
            last = run.position >= request.sampling.output_tokens_max
            chunk = TokenChunk(
                request_id=request.request_id,
                attempt=request.attempt,
                position=position,
                tokens=[token_at(request.request_id, position)],
                finish="length" if last else None,
            )
            chunks.setdefault(request.ingress_id, []).append(chunk)
            if last:
                del engine.runs[key]
                ended.append(EndedAttempt(request_id=request.request_id, attempt=request.attempt))
        for ingress_id, made in chunks.items():
            message = TokenChunks(
                replica_id=engine.replica_id, incarnation=self._incarnation, chunks=made
            )
            self._port.publish(TOKEN_CHUNKS.send(message, ingress_id=ingress_id))
        if ended:
            self._port.feed(RequestsEnded(ended=tuple(ended)))
        self._keep_stepping(engine)

    def _break(self, engine: _Engine, detail: str) -> None:
        engine.ready, engine.broken = False, True
        engine.runs.clear()
        self._port.feed(
            EngineBroken(replica_id=engine.replica_id, generation=engine.generation, detail=detail)
        )
