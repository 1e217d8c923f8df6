"""Drives one core in production: messages, timers and outcomes in, effects out.

One inbox and one task that steps the core, so cores need no locks; everything else only enqueues.
The inbox is bounded: a frequent report replaces its own older copy, a question that finds it full
is refused through ``refuse``, anything else is dropped, counted and logged. All messages of the
control plane may be lost anyway: their owners repeat them.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shared.bus import Bus, Delivery
from shared.clock import Clock
from shared.core import (
    Ask,
    Core,
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    Reply,
    SetTimer,
    Start,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.errors import BusUnavailable, PayloadTooLarge
from shared.messages.base import Message, decode, encode
from shared.subjects import Subject
from shared.telemetry import Metrics, Tracing

log = logging.getLogger("oserve.runtime")

STATE_RETRY_S = 0.25
CHECK_PERIOD_S = 1.0
Job = Callable[[Any], Awaitable[Message | None] | Message | None]


@dataclass(slots=True, kw_only=True)
class Wiring:
    """What a core is connected to. ``jobs`` perform Start effects; ``refuse`` answers a query
    that finds the inbox full; ``drained`` tells when a draining core has settled."""

    inputs: Sequence[Subject[Any]] = ()
    queries: Sequence[tuple[Subject[Any], str]] = ()
    jobs: Mapping[str, Job] = field(default_factory=dict[str, Job])
    inbox_max: int = 4096
    refuse: Callable[[Query], Message] | None = None
    drained: Callable[[], bool] = lambda: True
    drain_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Latest:
    """Marks the place in the inbox of the newest report on ``subject``."""

    subject: str


@dataclass(frozen=True, slots=True)
class _Traced:
    event: Any
    name: str
    headers: Mapping[str, str]


class Runtime:
    """One core, driven. ``feed`` is how a service's adapters hand in events of their own."""

    def __init__(  # the composition root of a service
        self,
        core: Core,
        wiring: Wiring,
        *,
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._core, self._wiring = core, wiring
        self._bus, self._clock, self._tracing = bus, clock, tracing
        self._inbox: deque[Any] = deque()
        self._latest: dict[str, tuple[Any, Mapping[str, str] | None]] = {}
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._dropped = metrics.counter(
            "inbox_dropped", "Messages dropped because the inbox was full", ["message"]
        )
        self._undecodable = metrics.counter(
            "messages_undecodable", "Messages that did not decode", ["message"]
        )
        self._steps = metrics.counter("core_steps", "Events the core has handled")

    def feed(self, event: Any) -> None:  # noqa: ANN401  # any core's event
        """Enqueue an event. Timers and outcomes are bounded by what the core asked for, so they
        always fit."""
        self._inbox.append(event)
        self._wake.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Subscribe, step until ``stopping`` is set and the core is drained, then return."""
        for subject in self._wiring.inputs:
            await self._bus.subscribe(subject.wildcard, self._receiver(subject))
        for subject, queue in self._wiring.queries:
            await self._bus.subscribe(subject.wildcard, self._receiver(subject), queue=queue)
        self._inbox.appendleft(Started())
        self._wake.set()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            stop = tasks.create_task(self._announce(stopping))
            try:
                await self._loop(stopping)
            finally:
                stop.cancel()
                for task in list(self._jobs):
                    task.cancel()

    async def _announce(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self.feed(Draining())

    async def _loop(self, stopping: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = float("inf")
        checked_s = loop.time()
        while True:
            while self._inbox:
                await self._handle(self._inbox.popleft())
            if loop.time() - checked_s >= CHECK_PERIOD_S:
                self._core.check()
                checked_s = loop.time()
            if stopping.is_set():
                deadline_s = min(deadline_s, loop.time() + self._wiring.drain_timeout_s)
                if self._wiring.drained() and not self._inbox:
                    return
                if loop.time() >= deadline_s:
                    log.warning("drain.timeout", extra={"after_s": self._wiring.drain_timeout_s})
                    return
            self._wake.clear()
            if self._inbox:
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), 0.05 if stopping.is_set() else 1.0)
            except TimeoutError:
                continue

    async def _handle(self, event: Any) -> None:  # noqa: ANN401  # any core's event
        headers: Mapping[str, str] | None = None
        name = ""
        if isinstance(event, _Latest):
            event, headers = self._latest.pop(event.subject)
        elif isinstance(event, _Traced):
            event, name, headers = event.event, event.name, event.headers
        self._steps.inc()
        if headers and self._tracing.enabled:
            with self._tracing.span(name or type(event).__name__, headers):
                await self._perform(self._core.step(event, self._clock.now_s()))
        else:
            await self._perform(self._core.step(event, self._clock.now_s()))

    async def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Publish(subject=subject, message=message) | Reply(to=subject, message=message):
                    await self._publish(subject, message)
                case Ask(subject=subject, message=message, reply_to=reply_to):
                    await self._publish(subject, message, reply_to=reply_to)
                case SetTimer(at_s=at_s, event=event):
                    delay_s = max(0.0, at_s - self._clock.now_s())
                    asyncio.get_running_loop().call_later(delay_s, self.feed, event)
                case Log(event=name, fields=fields, level=level):
                    log.log(logging.getLevelNamesMapping()[level.upper()], name, extra=fields)
                case Store():
                    self._spawn(self._store(effect))
                case Load():
                    self._spawn(self._load(effect))
                case Start(job=job, argument=argument):
                    self._start(job, argument)

    async def _publish(self, subject: str, message: Any, *, reply_to: str = "") -> None:  # noqa: ANN401
        try:
            await self._bus.publish(
                subject, encode(message), reply_to=reply_to, headers=self._tracing.headers()
            )
        except (BusUnavailable, PayloadTooLarge) as error:
            log.warning("publish.failed", extra={"subject": subject, "error": str(error)})

    def _start(self, job: str, argument: Any) -> None:  # noqa: ANN401  # the job's own type
        outcome = self._wiring.jobs[job](argument)
        if inspect.isawaitable(outcome):
            self._spawn(self._finish(outcome))
        elif outcome is not None:
            self.feed(outcome)

    async def _finish(self, work: Awaitable[Message | None]) -> None:
        outcome = await work
        if outcome is not None:
            self.feed(outcome)

    def _spawn(self, work: Any) -> None:  # noqa: ANN401  # a coroutine
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _store(self, effect: Store) -> None:
        payload = encode(effect.message)
        while True:
            try:
                revision = await self._bus.store(effect.key, payload, revision=effect.revision)
            except BusUnavailable as error:
                # The write may have happened: a retry that finds our own value is a success.
                log.warning("state.store_retry", extra={"key": effect.key, "error": str(error)})
                await asyncio.sleep(STATE_RETRY_S)
                continue
            if revision is None:
                revision = await self._ours(effect.key, payload)
            if revision is None:
                self.feed(StoreConflict(key=effect.key))
            else:
                self.feed(Stored(key=effect.key, revision=revision))
            return

    async def _ours(self, key: str, payload: bytes) -> int | None:
        try:
            value, revision = await self._bus.load(key)
        except BusUnavailable:
            return None
        return revision if value == payload else None

    async def _load(self, effect: Load) -> None:
        while True:
            try:
                value, revision = await self._bus.load(effect.key)
                break
            except BusUnavailable as error:
                log.warning("state.load_retry", extra={"key": effect.key, "error": str(error)})
                await asyncio.sleep(STATE_RETRY_S)
        message: Message | None = None
        if value is not None:
            try:
                message = decode(value, effect.as_type)
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                log.exception("state.undecodable", extra={"key": effect.key, "error": str(error)})
        self.feed(Loaded(key=effect.key, message=message, revision=revision))

    def _receiver(self, subject: Subject[Any]) -> Callable[[Delivery], None]:
        """Decode and enqueue. Frequent snapshots (``data`` subjects) are coalesced by subject."""
        name = subject.message.__name__
        snapshot = ".data." in subject.pattern
        kind = subject.message
        decoder = msgspec.msgpack.Decoder(kind).decode

        def on_delivery(delivery: Delivery) -> None:
            try:
                event = decoder(delivery.payload)
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                self._undecodable.labels(name).inc()
                log.warning(
                    "message.undecodable", extra={"subject": delivery.subject, "error": str(error)}
                )
                return
            if snapshot:
                self._enqueue_latest(delivery, event, name)
            else:
                self._enqueue(delivery, event, subject.pattern, name)

        return on_delivery

    def _enqueue_latest(self, delivery: Delivery, event: Any, name: str) -> None:  # noqa: ANN401
        known = delivery.subject in self._latest
        if not known and len(self._inbox) >= self._wiring.inbox_max:
            self._drop(name)
            return
        self._latest[delivery.subject] = (event, delivery.headers)
        if not known:
            self.feed(_Latest(delivery.subject))

    def _enqueue(self, delivery: Delivery, event: Any, pattern: str, name: str) -> None:  # noqa: ANN401
        query = Query(event, delivery.reply_to) if delivery.reply_to else None
        if len(self._inbox) >= self._wiring.inbox_max:
            self._drop(name)
            if query is not None and self._wiring.refuse is not None and self._tasks is not None:
                self._spawn(self._publish(query.reply_to, self._wiring.refuse(query)))
            return
        event = query or event
        self.feed(_Traced(event, pattern, delivery.headers) if delivery.headers else event)

    def _drop(self, name: str) -> None:
        self._dropped.labels(name).inc()
        log.warning("inbox.full", extra={"message_type": name, "max": self._wiring.inbox_max})
