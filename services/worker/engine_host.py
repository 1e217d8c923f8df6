"""Runs one engine: admissions and aborts between steps, steps while there is work, chunks out.

An engine that blocks steps in a thread of its own, so that the event loop stays live. One that
only computes how long its step takes is called inline, and its chunks wait until they are due.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar, cast

from services.worker.attempts import Attempt, engine_request_of
from services.worker.between import Between
from services.worker.engine.factory import Building
from services.worker.engine.interface import Engine, EngineLoad, EngineRequest, LiveState
from services.worker.engine_thread import EngineThread, StartGivenUp, go_on
from services.worker.events import (
    Admission,
    EngineBroken,
    EnginePaused,
    EngineReady,
    EngineRelease,
    EngineStart,
    EngineStopped,
    MeasuredEngine,
    RequestRefused,
)  # fmt: skip
from services.worker.handover import Handover
from services.worker.host_context import HostContext
from services.worker.sending import Sender
from services.worker.takeover import Takeover, from_elsewhere
from shared.errors import Rejected
from shared.messages.replicas import Shares
from shared.messages.requests import FailureCode

log = logging.getLogger("oserve.worker")

LAG_S_MAX = 0.1  # how far paced steps may fall behind and still catch up
CHECK_PERIOD_S = 1.0  # an idle engine's invariants are checked at most this often
STEP_WEIGHT = 0.1  # of the newest step in the mean step time
T = TypeVar("T")


class EngineHost:
    def __init__(self, start: EngineStart, context: HostContext) -> None:
        self.replica_id, self.generation = start.spec.replica_id, start.generation
        self._start, self._context, self._factory = start, context, context.factory
        self._clock, self._feed = context.clock, context.feed
        self._engine: Engine | None = None
        self._live: dict[str, Attempt] = {}  # by key; those held for another replica included
        self._adds: dict[str, EngineRequest] = {}  # to do between steps; the core bounds them
        self._aborts: list[str] = []
        self._wake = asyncio.Event()
        self._between = Between(self._wake.set)
        self._handover = Handover(self.replica_id, self._between, self._live, self._clock)
        self.takeover = Takeover(
            self.replica_id, self.generation, self._between, context, self._live
        )
        self._sender = Sender(self.replica_id, context, self._live)
        self._stopping = False
        self._building = Building(lambda: go_on(self._stopping))
        self._stepping_since_s: float | None = None
        self._due_s = self._checked_s = 0.0
        self._load, self._block_tokens = EngineLoad(), 0
        self.step_s = 0.0
        self.steps_total = self.requests_total = 0

    def admit(self, admission: Admission) -> RequestRefused | None:
        """Take the request, or say why not; a blocking engine may yet refuse between steps, and
        one that stands still takes it when it goes on."""
        request = admission.request
        still = self._handover.pausing or self._handover.paused
        if still and len(self._adds) >= self._factory.waiting_max:
            return RequestRefused(
                request_id=request.request_id,
                attempt=request.attempt,
                failure="overloaded",
                detail="the replica is paused, and as many requests wait as it may keep",
            )
        self._live[admission.key] = Attempt.of(request)
        engine_request = engine_request_of(admission)
        self._wake.set()
        if self._engine is None or self._engine.blocking or still:
            self._adds[admission.key] = engine_request
            return None
        return self._add(self._engine, engine_request)

    def abort(self, key: str) -> None:
        """Its chunks stop now, even those of a step in progress."""
        self._live.pop(key, None)
        if self._adds.pop(key, None) is not None or self._engine is None:
            return
        if self._engine.blocking:
            self._aborts.append(key)
        else:
            self._engine.abort(key)
        self._wake.set()

    def pause(self, shares: Shares) -> None:
        """EnginePaused follows at the next step boundary."""
        self._handover.pause(shares)
        self._wake.set()

    def resume(self) -> None:
        self._handover.resume()
        self._wake.set()

    def release(self, order: EngineRelease) -> None:
        self.requests_total += self.takeover.release(order)

    def stop(self) -> None:
        """Drop what runs and end: a step in progress is waited for, its result not used, a start is
        given up. EngineStopped follows."""
        self._stopping = True
        self._live.clear()
        self._adds.clear()
        self._wake.set()

    def measured(self, *, stall_s: float) -> MeasuredEngine:
        since_s = self._stepping_since_s
        if since_s is None and self._engine is not None:
            self._load = self._engine.load()
        fetched = (self._engine or self._building).fetched
        return MeasuredEngine(
            replica_id=self.replica_id,
            generation=self.generation,
            load=self._load,
            running_max=self._factory.running_max,
            waiting_max=self._factory.waiting_max,
            output_tokens_total=self._sender.output_tokens_total,
            requests_total=self.requests_total,
            step_s=self.step_s,
            stalled=since_s is not None and self._clock.now_s() - since_s > stall_s,
            cache_tokens=self._load.kv_blocks_used * self._block_tokens,
            fetched_bytes=from_elsewhere(fetched, self._context.config.worker_id),
            cache_bytes=self._engine.cache_bytes if self._engine is not None else 0,
        )

    async def run(self) -> None:
        """From start to stop. Whatever an engine raises loses its replica, not the worker; a
        broken invariant (AssertionError) ends the process, like everywhere."""
        thread = EngineThread(f"engine-{self.replica_id}-{self.generation}")
        try:
            with suppress(StartGivenUp):
                await self._serve(thread)
        except AssertionError:
            raise
        except Exception as error:  # torch and drivers raise anything
            log.warning("engine.broken", exc_info=error, extra={"replica_id": self.replica_id})
            self._feed(
                EngineBroken(
                    replica_id=self.replica_id,
                    generation=self.generation,
                    detail=f"{type(error).__name__}: {error}",
                )
            )
        else:
            self._feed(EngineStopped(replica_id=self.replica_id, generation=self.generation))
        finally:
            self._live.clear()
            self._between.close()
            self._handover.close()
            self.takeover.close()
            thread.close()

    async def _serve(self, thread: EngineThread) -> None:
        started_s = self._clock.now_s()
        engine = await thread.call(lambda: self._factory.build(self._start, self._building))
        fault: Exception | None = None
        try:
            await self._delay(started_s)
            if not self._stopping:
                self._begin(engine)
            await self._loop(engine, thread)
        except Exception as error:  # noqa: BLE001  # raised again once the engine is closed
            fault = error
        self._engine, self._stepping_since_s = None, None
        self._between.close()
        try:
            await thread.call(engine.close)
        except Exception:
            if fault is None:
                raise
            log.exception("engine.close_failed", extra={"replica_id": self.replica_id})
        if fault is not None:
            raise fault

    def _begin(self, engine: Engine) -> None:
        self._engine, self._block_tokens = engine, engine.block_tokens
        if self._context.peers is not None:
            self._handover.offer(self._context.peers)
        ready = EngineReady(
            replica_id=self.replica_id,
            generation=self.generation,
            bytes_by_source=dict(engine.fetched),
            took_s=engine.fetch_s,
            cache_bytes=engine.cache_bytes,
            cache_bytes_full=engine.cache_bytes_full,
        )
        self._feed(ready)

    async def _delay(self, started_s: float) -> None:
        """A start takes at least the factory's ``start_s``, unless it is given up."""
        left_s = started_s + self._factory.start_s(self._start) - self._clock.now_s()
        if left_s > 0 and not self._stopping:
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left_s)

    async def _loop(self, engine: Engine, thread: EngineThread) -> None:
        def performer(call: Callable[[], T]) -> Awaitable[T]:
            return self._call(engine, thread, call)

        while not self._stopping:
            self._apply(engine)
            if await self._between.perform(engine, performer):
                continue  # they took their time: more may have come
            if self._handover.pausing:
                self._stand_still(await self._call(engine, thread, engine.states))
            elif engine.has_work and not self._handover.paused:
                await self._step(engine, thread)
            else:
                self.takeover.stepped()
                await self._idle(engine)

    async def _call(self, engine: Engine, thread: EngineThread, call: Callable[[], T]) -> T:
        """Where the engine is stepped; it may take as long as a step."""
        if not engine.blocking:
            return call()
        self._load = engine.load()
        self._stepping_since_s = self._clock.now_s()
        try:
            return await thread.call(call)
        finally:
            self._stepping_since_s = None

    def _stand_still(self, states: list[LiveState]) -> None:
        moving = self._handover.stand_still(states)
        if moving is not None:
            paused = EnginePaused(
                replica_id=self.replica_id, generation=self.generation, moving=moving
            )
            self._feed(paused)

    async def _idle(self, engine: Engine) -> None:
        now_s = self._clock.now_s()
        if now_s - self._checked_s >= CHECK_PERIOD_S:
            self._checked_s = now_s
            engine.check()
        self._wake.clear()
        await self._wake.wait()
        self._due_s = self._clock.now_s()

    def _apply(self, engine: Engine) -> None:
        """What was asked for during the last step."""
        for key in self._aborts:
            engine.abort(key)
        self._aborts.clear()
        if self._handover.paused:
            return
        adds, self._adds = self._adds, {}
        for request in adds.values():
            refused = self._add(engine, request)
            if refused is not None:
                self._feed(refused)

    def _add(self, engine: Engine, request: EngineRequest) -> RequestRefused | None:
        try:
            engine.add(request)
        except Rejected as rejected:
            attempt = self._live.pop(request.key)
            return RequestRefused(
                request_id=attempt.request_id,
                attempt=attempt.attempt,
                failure=cast("FailureCode", rejected.code),
                detail=rejected.detail,
            )
        self.requests_total += 1
        return None

    async def _step(self, engine: Engine, thread: EngineThread) -> None:
        began_s = self._clock.now_s()
        result = await self._call(engine, thread, engine.step)
        if not engine.blocking:
            await self._pace(began_s, result.duration_s)
        took_s = self._clock.now_s() - began_s
        self.steps_total += 1
        self.step_s += STEP_WEIGHT * (took_s - self.step_s) if self.step_s else took_s
        if result.chunks:
            await self._sender.send(result.chunks)
            # What is published leaves in the next turn of the loop: not behind the next step.
            await asyncio.sleep(0)
        self.takeover.stepped()

    async def _pace(self, now_s: float, duration_s: float) -> None:
        """Wait until the step is due. Due times add up, so that many short steps do not drift by
        the timer's error; after a delay longer than LAG_S_MAX they start over."""
        self._due_s = max(self._due_s, now_s - LAG_S_MAX) + duration_s
        await asyncio.sleep(max(0.0, self._due_s - self._clock.now_s()))
