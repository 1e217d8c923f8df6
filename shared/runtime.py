"""Drives one core in production: messages, timers and outcomes in, effects out.

One inbox and one task that steps the core, so cores need no locks; everything else only enqueues.
What ends a run: being told to stop and having drained, or the first error, which it raises.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shared.bus import Bus
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
from shared.inbox import Arrival, Inbox
from shared.messages.base import Message, decode, encode
from shared.subjects import Subject
from shared.telemetry import Metrics, Tracing, log_fields

log = logging.getLogger("oserve.runtime")

STATE_RETRY_S = 0.25
CHECK_PERIOD_S = 1.0
DRAIN_POLL_S = 0.05
STORE_GRACE_S = 2.0  # how long a drained core's last Store may take before we leave without it
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
        self._inbox = Inbox(
            inbox_max=wiring.inbox_max, refuse=self._refuse, clock=clock, metrics=metrics
        )
        self._tasks: asyncio.TaskGroup | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._stores: set[asyncio.Task[None]] = set()
        self._steps = metrics.counter("core_steps", "Events the core has handled")
        self._published = metrics.counter("messages_published", "Messages sent", ["message"])
        self._told = metrics.counter("core_log_events", "What the core told the log", ["event"])

    def feed(self, event: Any) -> None:  # noqa: ANN401  # any core's event
        """Enqueue an event. Timers and outcomes are bounded by what the core asked for, so they
        always fit."""
        self._inbox.feed(event)

    async def run(self, stopping: asyncio.Event) -> None:
        """Subscribe, step until ``stopping`` is set and the core is drained, then return."""
        for subject in self._wiring.inputs:
            await self._bus.subscribe(subject.wildcard, self._inbox.receiver(subject))
        for subject, queue in self._wiring.queries:
            await self._bus.subscribe(subject.wildcard, self._inbox.receiver(subject), queue=queue)
        self._inbox.feed_first(Started())
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                stop = tasks.create_task(self._wake_at_stop(stopping))
                try:
                    await self._loop(stopping)
                finally:
                    self._tasks = None
                    stop.cancel()
                    for task in list(self._jobs):
                        task.cancel()
        except BaseExceptionGroup as group:  # one cause is the rule: show it bare
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise

    async def _wake_at_stop(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self._inbox.wake()

    async def _loop(self, stopping: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        stopped_s: float | None = None
        checked_s = loop.time()
        while True:
            for _ in range(len(self._inbox)):  # what came meanwhile waits for the checks below
                await self._handle(self._inbox.take())
            now_s = loop.time()
            if now_s - checked_s >= CHECK_PERIOD_S:
                self._core.check()
                checked_s = now_s
            if stopping.is_set() and stopped_s is None:
                stopped_s = now_s
                self.feed(Draining())
                continue
            if stopped_s is not None and self._may_leave(now_s - stopped_s):
                return
            if self._inbox:
                await asyncio.sleep(0)  # a busy core must not starve the loop that feeds it
                continue
            await self._inbox.wait(CHECK_PERIOD_S if stopped_s is None else DRAIN_POLL_S)

    def _may_leave(self, after_s: float) -> bool:
        """Whether a core told to drain ``after_s`` ago has settled, or has had its time."""
        if after_s >= self._wiring.drain_timeout_s:
            log.warning("drain.timeout", extra={"after_s": self._wiring.drain_timeout_s})
            return True
        if self._inbox or not self._wiring.drained():
            return False
        return not self._stores or after_s >= STORE_GRACE_S

    async def _handle(self, arrival: Arrival) -> None:
        self._steps.inc()
        event, headers = arrival.event, arrival.headers
        if headers and self._tracing.enabled:
            with self._tracing.span(arrival.name or type(event).__name__, headers):
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
                    self._told.labels(name).inc()
                    log.log(
                        logging.getLevelNamesMapping()[level.upper()],
                        name,
                        extra=log_fields(fields),
                    )
                case Store():
                    self._stores.add(task := self._spawn(self._store(effect)))
                    task.add_done_callback(self._stores.discard)
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
        else:
            self._published.labels(type(message).__name__).inc()

    def _refuse(self, query: Query) -> None:
        if self._wiring.refuse is not None and self._tasks is not None:
            self._spawn(self._publish(query.reply_to, self._wiring.refuse(query)))

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

    def _spawn(self, work: Any) -> asyncio.Task[None]:  # noqa: ANN401  # a coroutine
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

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
