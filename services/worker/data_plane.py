"""Performs what the worker's core asks of its engines, and feeds back what becomes of it."""

import asyncio
from collections.abc import Mapping

from services.worker.config import WorkerConfig
from services.worker.core import WorkerCore, WorkerEvent
from services.worker.engine.factory import EngineFactory
from services.worker.engine_host import EngineHost, Feed
from services.worker.events import (
    ABORT,
    ADMIT,
    MEASURE,
    START_ENGINE,
    STOP_ENGINE,
    Admission,
    EngineAbort,
    EngineLoads,
    EngineStart,
    EngineStop,
    MeasuredEngine,
    RequestRefused,
)  # fmt: skip
from services.worker.outbox import Outbox
from shared.core import Effect, Publish
from shared.messages.requests import TokenChunks
from shared.runtime import Job
from shared.service import ServiceContext
from shared.telemetry import Metrics


class DataPlane:
    """``feed`` hands events to the core's runtime; ``tasks`` own the engines' loops."""

    def __init__(
        self,
        config: WorkerConfig,
        factory: EngineFactory,
        *,
        outbox: Outbox,
        context: ServiceContext,
        tasks: asyncio.TaskGroup,
        feed: Feed,
    ) -> None:
        self._config, self._factory, self._outbox = config, factory, outbox
        self._clock, self._tasks, self._feed = context.clock, tasks, feed
        self._hosts: dict[str, EngineHost] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._meters = _Meters(context.metrics)

    def jobs(self) -> Mapping[str, Job]:
        return {
            START_ENGINE: self._start_engine,
            STOP_ENGINE: self._stop_engine,
            ADMIT: self._admit,
            ABORT: self._abort,
            MEASURE: self._measure,
        }

    def close(self) -> None:
        """Give up on what still runs: the process ends."""
        for task in self._running:
            task.cancel()

    def _start_engine(self, start: EngineStart) -> None:
        host = EngineHost(
            start, self._factory, outbox=self._outbox, clock=self._clock, feed=self._feed
        )
        self._hosts[host.replica_id] = host
        task = self._tasks.create_task(self._run(host))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, host: EngineHost) -> None:
        await host.run()
        if self._hosts.get(host.replica_id) is host:
            del self._hosts[host.replica_id]

    def _stop_engine(self, stop: EngineStop) -> None:
        """EngineStopped follows, or EngineBroken if that is already on its way."""
        host = self._hosts.get(stop.replica_id)
        if host is not None and host.generation == stop.generation:
            host.stop()

    def _admit(self, admission: Admission) -> RequestRefused | None:
        """A host that has just broken takes nothing: the EngineBroken on its way ends it all."""
        host = self._hosts.get(admission.request.replica_id)
        return host.admit(admission) if host is not None else None

    def _abort(self, abort: EngineAbort) -> None:
        host = self._hosts.get(abort.replica_id)
        if host is not None:
            host.abort(abort.key)

    def _measure(self, _: None) -> EngineLoads:
        stall_s = self._config.step_stall_s
        measured = tuple(host.measured(stall_s=stall_s) for host in self._hosts.values())
        self._meters.show(measured)
        return EngineLoads(engines=measured)


class ChunksApart:
    """The core, with its token chunks sent by the outbox: acknowledgements then share a message
    with the engine's chunks, in the same order."""

    def __init__(self, core: WorkerCore, outbox: Outbox) -> None:
        self._core, self._outbox = core, outbox

    def step(self, event: WorkerEvent, now_s: float) -> list[Effect]:
        rest: list[Effect] = []
        for effect in self._core.step(event, now_s):
            if isinstance(effect, Publish) and isinstance(effect.message, TokenChunks):
                self._outbox.put(effect.subject, effect.message)
            else:
                rest.append(effect)
        return rest

    def check(self) -> None:
        self._core.check()


class _Meters:
    """Prometheus' view of the engines, brought up to date with each measurement."""

    def __init__(self, metrics: Metrics) -> None:
        labels = ["replica_id"]
        self._running = metrics.gauge("engine_running", "Requests in the batch", labels)
        self._waiting = metrics.gauge("engine_waiting", "Requests that wait", labels)
        self._blocks = metrics.gauge("engine_kv_blocks_used", "KV blocks in use", labels)
        self._step_s = metrics.gauge("engine_step_seconds", "Mean time of a step", labels)
        self._tokens = metrics.counter("engine_output_tokens", "Output tokens made", labels)
        self._requests = metrics.counter("engine_requests", "Requests admitted", labels)
        self._seen: dict[str, MeasuredEngine] = {}

    def show(self, engines: tuple[MeasuredEngine, ...]) -> None:
        for engine in engines:
            replica_id = engine.replica_id
            self._running.labels(replica_id).set(engine.load.running)
            self._waiting.labels(replica_id).set(engine.load.waiting)
            self._blocks.labels(replica_id).set(engine.load.kv_blocks_used)
            self._step_s.labels(replica_id).set(engine.step_s)
            seen = self._seen.get(replica_id)
            known = seen is not None and seen.generation == engine.generation
            tokens = seen.output_tokens_total if known and seen is not None else 0
            requests = seen.requests_total if known and seen is not None else 0
            self._tokens.labels(replica_id).inc(engine.output_tokens_total - tokens)
            self._requests.labels(replica_id).inc(engine.requests_total - requests)
        for replica_id in self._seen.keys() - {engine.replica_id for engine in engines}:
            for meter in (self._running, self._waiting, self._blocks, self._step_s):
                meter.remove(replica_id)
        self._seen = {engine.replica_id: engine for engine in engines}
