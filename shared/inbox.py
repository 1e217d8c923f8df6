"""The bounded inbox of one core: decodes what arrives, keeps the newest, refuses and counts.

A snapshot replaces its own older copy in place; a question that finds the inbox full is handed to
``refuse``; anything else is dropped and counted. Messages of the control plane may be lost anyway:
their owners repeat them.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.bus import Delivery
from shared.clock import Clock
from shared.core import Query
from shared.messages.base import DataMessage, Message, decode
from shared.subjects import Subject
from shared.telemetry import Metrics

log = logging.getLogger("oserve.runtime")

WARNING_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """An event, and the trace context it came with."""

    event: Any
    name: str = ""
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Latest:
    """Marks the place in the inbox of the newest snapshot on ``subject``."""

    subject: str


class Inbox:
    """``feed`` always fits: timers and outcomes are bounded by what the core asked for. What the
    bus delivers fits only while fewer than ``inbox_max`` events wait."""

    def __init__(
        self,
        *,
        inbox_max: int,
        refuse: Callable[[Query], None],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._max, self._refuse, self._clock = inbox_max, refuse, clock
        self._events: deque[Any] = deque()
        self._latest: dict[str, Arrival] = {}
        self._warned_s: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._dropped = metrics.counter(
            "inbox_dropped", "Messages dropped because the inbox was full", ["message"]
        )
        self._undecodable = metrics.counter(
            "messages_undecodable", "Messages that did not decode", ["message"]
        )

    def __len__(self) -> int:
        return len(self._events)

    def feed(self, event: Any) -> None:  # noqa: ANN401  # any core's event
        self._events.append(event)
        self._wake.set()

    def feed_first(self, event: Any) -> None:  # noqa: ANN401  # any core's event
        self._events.appendleft(event)
        self._wake.set()

    def take(self) -> Arrival:
        """The oldest event; the newest of its kind if it is a snapshot."""
        event = self._events.popleft()
        if isinstance(event, _Latest):
            return self._latest.pop(event.subject)
        return event if isinstance(event, Arrival) else Arrival(event)

    def wake(self) -> None:
        """End a ``wait`` although nothing came."""
        self._wake.set()

    async def wait(self, timeout_s: float) -> None:
        """Until something is fed, at most ``timeout_s``."""
        self._wake.clear()
        if self._events:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def receiver(self, subject: Subject[Any]) -> Callable[[Delivery], None]:
        """A bus handler that decodes and enqueues; it never blocks and never raises."""
        name = subject.message.__name__
        kind: type[Message | DataMessage] = subject.message

        def on_delivery(delivery: Delivery) -> None:
            try:
                event = decode(delivery.payload, kind)
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                self._undecodable.labels(name).inc()
                self._warn("message.undecodable", subject=delivery.subject, error=str(error))
                return
            if subject.snapshot:
                self._enqueue_latest(delivery, event, name)
            else:
                self._enqueue(delivery, event, subject.pattern)

        return on_delivery

    def _enqueue_latest(self, delivery: Delivery, event: Any, name: str) -> None:  # noqa: ANN401
        known = delivery.subject in self._latest
        if not known and len(self._events) >= self._max:
            self._drop(name)
            return
        self._latest[delivery.subject] = Arrival(event, name, delivery.headers)
        if not known:
            self.feed(_Latest(delivery.subject))

    def _enqueue(self, delivery: Delivery, event: Any, pattern: str) -> None:  # noqa: ANN401
        query = Query(event, delivery.reply_to) if delivery.reply_to else None
        if len(self._events) >= self._max:
            self._drop(type(event).__name__)
            if query is not None:
                self._refuse(query)
            return
        event = query or event
        self.feed(Arrival(event, pattern, delivery.headers) if delivery.headers else event)

    def _drop(self, name: str) -> None:
        self._dropped.labels(name).inc()
        self._warn("inbox.full", message_type=name, inbox_max=self._max)

    def _warn(self, event: str, **fields: str | float) -> None:
        """Once a second at most: the counters hold the number, and a flood must not become two."""
        now_s = self._clock.now_s()
        if now_s - self._warned_s.get(event, float("-inf")) >= WARNING_PERIOD_S:
            self._warned_s[event] = now_s
            log.warning(event, extra=fields)
