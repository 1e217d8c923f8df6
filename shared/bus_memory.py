"""A bus inside one event loop, for tests: the same contract as NATS, nothing on the wire.

Delivery is in order and immediate in the next loop turn; a queue group gets each message once,
in turn.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import count

from shared.bus import Delivery, Handler, Subscription
from shared.bus_storage import HISTORY_MAX, Kept
from shared.clock import Clock, SystemClock
from shared.errors import BusUnavailable, DeadlineExceeded, PayloadTooLarge
from shared.subjects import EVENTS

JOURNAL_MAX = 100_000


class _MemorySubscription:
    def __init__(self, bus: "MemoryBus", pattern: str, handler: Handler, queue: str) -> None:
        self.pattern, self.queue = pattern.split("."), queue
        self._bus, self._handler = bus, handler

    def deliver(self, delivery: Delivery) -> None:
        if self in self._bus.subscriptions:  # it may have left since the message was sent
            self._handler(delivery)

    async def unsubscribe(self) -> None:
        if self in self._bus.subscriptions:
            self._bus.subscriptions.remove(self)


def matches(pattern: Sequence[str], subject: Sequence[str]) -> bool:
    """NATS wildcards: ``*`` is one token, ``>`` the rest (at least one)."""
    for i, token in enumerate(pattern):
        if token == ">":  # noqa: S105  # a subject token
            return len(subject) > i
        if i >= len(subject) or token not in ("*", subject[i]):
            return False
    return len(pattern) == len(subject)


class MemoryBus:
    """``sent`` keeps what was published, newest last, for tests to look at. ``clock``: when events
    came, as the journal has it."""

    def __init__(self, *, payload_bytes_max: int = 8 << 20, clock: Clock | None = None) -> None:
        self.subscriptions: list[_MemorySubscription] = []
        self.sent: deque[tuple[str, bytes]] = deque(maxlen=JOURNAL_MAX)
        self._journal: deque[Kept] = deque(maxlen=JOURNAL_MAX)
        self._clock = clock or SystemClock()
        self.registered: list[tuple[str, str, str, dict[str, str]]] = []
        self._payload_bytes_max = payload_bytes_max
        self._turn: dict[str, int] = {}
        self._closed = False
        self._kv: dict[str, tuple[bytes, int]] = {}
        self._revision = 0
        self._inboxes = count()

    @property
    def connected(self) -> bool:
        return not self._closed

    @property
    def payload_bytes_max(self) -> int:
        return self._payload_bytes_max

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply_to: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        self._check_open(f"publish on {subject}")
        self._check_size(subject, payload)
        self.sent.append((subject, payload))
        if matches(EVENTS.split("."), subject.split(".")):
            self._journal.append(Kept(self._clock.unix_s(), subject, payload))
        delivery = Delivery(subject, payload, reply_to, headers)
        loop = asyncio.get_running_loop()
        for subscription in self._receivers(subject):
            loop.call_soon(subscription.deliver, delivery)

    def _receivers(self, subject: str) -> list[_MemorySubscription]:
        tokens = subject.split(".")
        found: list[_MemorySubscription] = []
        groups: dict[str, list[_MemorySubscription]] = {}
        for subscription in self.subscriptions:
            if not matches(subscription.pattern, tokens):
                continue
            if subscription.queue:
                groups.setdefault(subscription.queue, []).append(subscription)
            else:
                found.append(subscription)
        for queue, members in groups.items():
            turn = self._turn.get(queue, 0)
            self._turn[queue] = turn + 1
            found.append(members[turn % len(members)])
        return found

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        self._check_open(f"subscribe to {subject}")
        subscription = _MemorySubscription(self, subject, handler, queue)
        self.subscriptions.append(subscription)
        return subscription

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        self._check_open(f"ask {subject}")
        if not any(matches(s.pattern, subject.split(".")) for s in self.subscriptions):
            raise BusUnavailable(f"nobody answers {subject}")
        inbox = f"_INBOX.{next(self._inboxes)}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def on_answer(delivery: Delivery) -> None:
            if not answer.done():
                answer.set_result(delivery.payload)

        subscription = await self.subscribe(inbox, on_answer)
        try:
            await self.publish(subject, payload, reply_to=inbox)
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer on {subject} within {timeout_s} s") from None
        finally:
            await subscription.unsubscribe()

    async def load(self, key: str) -> tuple[bytes | None, int]:
        self._check_open(f"read state {key}")
        return self._kv.get(key, (None, 0))

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        self._check_open(f"write state {key}")
        self._check_size(key, value)
        if self._kv.get(key, (b"", 0))[1] != revision:
            return None
        self._revision += 1
        self._kv[key] = (value, self._revision)
        return self._revision

    async def history(self, subject: str, *, limit: int, since_s: float = 0.0) -> list[Kept]:
        assert limit > 0, limit
        self._check_open(f"read events {subject}")
        pattern = subject.split(".")
        found = [
            kept
            for kept in self._journal
            if kept.at_s >= since_s and matches(pattern, kept.subject.split("."))
        ]
        return found[-min(limit, HISTORY_MAX) :]

    async def register(
        self,
        *,
        name: str,
        version: str,
        description: str,
        metadata: dict[str, str],
    ) -> None:
        self.registered.append((name, version, description, metadata))

    async def close(self) -> None:
        """Deliver what is on its way, then leave. Idempotent."""
        if not self._closed:
            await asyncio.sleep(0)
        self._closed = True
        self.subscriptions.clear()

    def _check_open(self, wish: str) -> None:
        if self._closed:
            raise BusUnavailable(f"cannot {wish}: the bus is closed")

    def _check_size(self, subject: str, payload: bytes) -> None:
        if len(payload) > self._payload_bytes_max:
            raise PayloadTooLarge(
                subject=subject, size_bytes=len(payload), limit_bytes=self._payload_bytes_max
            )
