"""Runs one engine: admissions and aborts between steps, steps while there is work, chunks out.

An engine that blocks steps in a thread of its own, so that the event loop stays live. One that
only computes how long its step takes is called inline, and its chunks wait until they are due.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from services.worker.engine.factory import EngineFactory
from services.worker.engine.interface import Engine, EngineChunk, EngineLoad, EngineRequest
from services.worker.engine_thread import EngineThread
from services.worker.events import (
    Admission,
    EndedAttempt,
    EngineBroken,
    EngineReady,
    EngineStart,
    EngineStopped,
    MeasuredEngine,
    RequestRefused,
    RequestsEnded,
)  # fmt: skip
from services.worker.outbox import Outbox
from shared.clock import Clock
from shared.errors import Rejected
from shared.messages.base import Message
from shared.messages.requests import FailureCode, TokenChunk
from shared.subjects import TOKEN_CHUNKS

log = logging.getLogger("oserve.worker")

LAG_S_MAX = 0.1  # how far paced steps may fall behind and still catch up
CHECK_PERIOD_S = 1.0  # an idle engine's invariants are checked at most this often
STEP_WEIGHT = 0.1  # of the newest step in the mean step time
Feed = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Where an admitted request's chunks go."""

    request_id: str
    attempt: int
    subject: str


class EngineHost:
    def __init__(
        self,
        start: EngineStart,
        factory: EngineFactory,
        *,
        outbox: Outbox,
        clock: Clock,
        feed: Feed,
    ) -> None:
        self.replica_id, self.generation = start.spec.replica_id, start.generation
        self._spec, self._factory = start.spec, factory
        self._outbox, self._clock, self._feed = outbox, clock, feed
        self._engine: Engine | None = None
        self._thread: EngineThread | None = None
        self._live: dict[str, _Attempt] = {}
        self._adds: dict[str, EngineRequest] = {}  # to do between steps; the core bounds them
        self._aborts: list[str] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._stepping_since_s: float | None = None
        self._due_s = self._checked_s = 0.0
        self._load = EngineLoad()
        self.step_s = 0.0
        self.steps_total = self.output_tokens_total = self.requests_total = 0

    def admit(self, admission: Admission) -> RequestRefused | None:
        """Take the request, or say why not; a blocking engine may yet refuse between steps."""
        request = admission.request
        attempt = _Attempt(
            request.request_id,
            request.attempt,
            TOKEN_CHUNKS.pattern.replace("{ingress_id}", request.ingress_id),
        )
        engine_request = EngineRequest(
            key=admission.key,
            prompt_tokens=request.prompt_tokens,
            sampling=request.sampling,
            output_tokens=request.output_tokens,
        )
        self._live[admission.key] = attempt
        self._wake.set()
        if self._engine is None or self._engine.blocking:
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

    def stop(self) -> None:
        """Drop what runs and end; a start or step in progress is waited for, its result not
        used. EngineStopped follows."""
        self._stopping = True
        self._live.clear()
        self._adds.clear()
        self._wake.set()

    def measured(self, *, stall_s: float) -> MeasuredEngine:
        since_s = self._stepping_since_s
        if since_s is None and self._engine is not None:
            self._load = self._engine.load()
        return MeasuredEngine(
            replica_id=self.replica_id,
            generation=self.generation,
            load=self._load,
            running_max=self._factory.running_max,
            waiting_max=self._factory.waiting_max,
            output_tokens_total=self.output_tokens_total,
            requests_total=self.requests_total,
            step_s=self.step_s,
            stalled=since_s is not None and self._clock.now_s() - since_s > stall_s,
        )

    async def run(self) -> None:
        """From start to stop. Whatever an engine raises loses its replica, not the worker; a
        broken invariant (AssertionError) ends the process, like everywhere."""
        self._thread = EngineThread(f"engine-{self.replica_id}")
        try:
            await self._serve(self._thread)
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
            self._thread.close()

    async def _serve(self, thread: EngineThread) -> None:
        started_s = self._clock.now_s()
        engine = await thread.call(lambda: self._factory.build(self._spec))
        fault: Exception | None = None
        try:
            await self._delay(started_s)
            self._engine = engine
            if not self._stopping:
                self._feed(EngineReady(replica_id=self.replica_id, generation=self.generation))
            await self._loop(engine, thread)
        except Exception as error:  # noqa: BLE001  # raised again once the engine is closed
            fault = error
        self._engine, self._stepping_since_s = None, None
        try:
            await thread.call(engine.close)
        except Exception:
            if fault is None:
                raise
            log.exception("engine.close_failed", extra={"replica_id": self.replica_id})
        if fault is not None:
            raise fault

    async def _delay(self, started_s: float) -> None:
        """A start takes at least the factory's ``start_s``, unless it is given up."""
        left_s = started_s + self._factory.start_s(self._spec) - self._clock.now_s()
        if left_s > 0 and not self._stopping:
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left_s)

    async def _loop(self, engine: Engine, thread: EngineThread) -> None:
        while not self._stopping:
            self._apply(engine)
            if engine.has_work:
                await self._step(engine, thread)
            else:
                await self._idle(engine)

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
        if engine.blocking:
            self._load = engine.load()
            self._stepping_since_s = began_s
            result = await thread.call(engine.step)
            self._stepping_since_s = None
        else:
            result = engine.step()
            await self._pace(began_s, result.duration_s)
        took_s = self._clock.now_s() - began_s
        self.steps_total += 1
        self.step_s += STEP_WEIGHT * (took_s - self.step_s) if self.step_s else took_s
        if result.chunks:
            await self._send(result.chunks)
            # What is published leaves in the next turn of the loop: not behind the next step.
            await asyncio.sleep(0)

    async def _pace(self, now_s: float, duration_s: float) -> None:
        """Wait until the step is due. Due times add up, so that many short steps do not drift by
        the timer's error; after a delay longer than LAG_S_MAX they start over."""
        self._due_s = max(self._due_s, now_s - LAG_S_MAX) + duration_s
        await asyncio.sleep(max(0.0, self._due_s - self._clock.now_s()))

    async def _send(self, chunks: list[EngineChunk]) -> None:
        ended: list[EndedAttempt] = []
        for chunk in chunks:
            attempt = self._live.get(chunk.key)
            if attempt is None:
                continue  # aborted since
            self.output_tokens_total += len(chunk.tokens)
            self._outbox.batch(attempt.subject, self.replica_id).append(
                TokenChunk(
                    request_id=attempt.request_id,
                    attempt=attempt.attempt,
                    position=chunk.position,
                    tokens=chunk.tokens,
                    finish=chunk.finish,
                    failure="engine" if chunk.finish == "failed" else None,
                    detail=chunk.detail,
                    logprobs=chunk.logprobs,
                )
            )
            if chunk.finish is not None:
                del self._live[chunk.key]
                ended.append(EndedAttempt(request_id=attempt.request_id, attempt=attempt.attempt))
        await self._outbox.flush()
        if ended:
            self._feed(RequestsEnded(ended=tuple(ended)))
