"""Performs what the worker's core asks of its engines, and feeds back what becomes of it."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from services.worker.core import WorkerCore, WorkerEvent
from services.worker.engine_host import EngineHost
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
    EngineAbort,
    EngineExpect,
    EngineGrow,
    EngineLoads,
    EnginePause,
    EngineRelease,
    EngineResume,
    EngineStage,
    EngineStart,
    EngineStop,
    EngineTake,
    MeasuredEngine,
    RequestRefused,
)  # fmt: skip
from services.worker.follower_host import FollowerHost
from services.worker.host_context import HostContext
from services.worker.outbox import Outbox
from shared.core import Effect, Publish
from shared.messages.requests import TokenChunks
from shared.runtime import Job
from shared.telemetry import Metrics

Order = EnginePause | EngineResume | EngineTake | EngineRelease | EngineStage | EngineGrow


class DataPlane:
    def __init__(self, context: HostContext, metrics: Metrics) -> None:
        self._context = context
        self._hosts: dict[str, EngineHost | FollowerHost] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._meters = _Meters(metrics)

    def jobs(self) -> Mapping[str, Job]:
        return {
            START_ENGINE: self._start_engine,
            STOP_ENGINE: self._stop_engine,
            ADMIT: self._admit,
            ABORT: self._abort,
            MEASURE: self._measure,
            EXPECT: self._expect,
            PAUSE_ENGINE: self._ordered(_pause),
            RESUME_ENGINE: self._ordered(_resume),
            TAKE: self._ordered(_take),
            RELEASE: self._ordered(_release),
            STAGE: self._ordered(_stage),
            GROW: self._ordered(_grow),
        }

    def close(self) -> None:
        """Give up on what still runs: the process ends."""
        for task in self._running:
            task.cancel()

    def _start_engine(self, start: EngineStart) -> None:
        kind = FollowerHost if start.rank else EngineHost
        host = kind(start, self._context)
        self._hosts[host.replica_id] = host
        task = self._context.tasks.create_task(self._run(host))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, host: EngineHost | FollowerHost) -> None:
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
        return host.admit(admission) if isinstance(host, EngineHost) else None

    def _abort(self, abort: EngineAbort) -> None:
        host = self._hosts.get(abort.replica_id)
        if isinstance(host, EngineHost):
            host.abort(abort.key)

    def _expect(self, order: EngineExpect) -> None:
        host = self._hosts.get(order.replica_id)
        if host is None or host.generation != order.generation:
            return
        if isinstance(host, EngineHost):
            host.takeover.expect(order)
        else:
            host.expect(order)

    def _ordered(self, give: Callable[[EngineHost, Any], None]) -> Job:
        """A job for the leader's engine. One that has just broken hears nothing any more: the
        EngineBroken on its way answers."""

        def job(order: Order) -> None:
            host = self._hosts.get(order.replica_id)
            if isinstance(host, EngineHost) and host.generation == order.generation:
                give(host, order)

        return job

    def _measure(self, _: None) -> EngineLoads:
        stall_s = self._context.config.step_stall_s
        leading = [host for host in self._hosts.values() if isinstance(host, EngineHost)]
        measured = tuple(host.measured(stall_s=stall_s) for host in leading)
        self._meters.show(measured)
        others = (host for host in self._hosts.values() if isinstance(host, FollowerHost))
        return EngineLoads(engines=(*measured, *(host.measured() for host in others)))


def _pause(host: EngineHost, order: EnginePause) -> None:
    host.pause(order.shares)


def _resume(host: EngineHost, _: EngineResume) -> None:
    host.resume()


def _take(host: EngineHost, order: EngineTake) -> None:
    host.takeover.take(order)


def _release(host: EngineHost, order: EngineRelease) -> None:
    host.release(order)


def _stage(host: EngineHost, order: EngineStage) -> None:
    host.takeover.advance_stage(order)


def _grow(host: EngineHost, _: EngineGrow) -> None:
    host.takeover.grow()


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
