"""A bus inside one event loop, for tests: the same contract as NATS, nothing on the wire.

Delivery is in order and immediate in the next loop turn; a queue group gets each message once,
in turn.
"""

import asyncio
from collections import deque
from itertools import count

from shared.bus import Delivery, Handler, Subscription
from shared.errors import DeadlineExceeded, PayloadTooLarge

JOURNAL_MAX = 100_000


class _MemorySubscription:
    def __init__(self, bus: "MemoryBus", pattern: str, handler: Handler, queue: str) -> None:
        self.pattern, self.handler, self.queue = pattern.split("."), handler, queue
        self._bus = bus

    async def unsubscribe(self) -> None:
        if self in self._bus.subscriptions:
            self._bus.subscriptions.remove(self)


def matches(pattern: list[str], subject: list[str]) -> bool:
    """NATS wildcards: ``*`` is one token, ``>`` the rest (at least one)."""
    for i, token in enumerate(pattern):
        if token == ">":  # noqa: S105  # a subject token
            return len(subject) > i
        if i >= len(subject) or token not in ("*", subject[i]):
            return False
    return len(pattern) == len(subject)


class MemoryBus:
    """``sent`` keeps what was published, newest last, for tests to look at."""

    def __init__(self, *, payload_bytes_max: int = 8 << 20) -> None:
        self.subscriptions: list[_MemorySubscription] = []
        self.sent: deque[tuple[str, bytes]] = deque(maxlen=JOURNAL_MAX)
        self.registered: list[tuple[str, str, str, dict[str, str]]] = []
        self._payload_bytes_max = payload_bytes_max
        self._turn: dict[tuple[str, str], int] = {}
        self._kv: dict[str, tuple[bytes, int]] = {}
        self._revision = 0
        self._inboxes = count()

    @property
    def connected(self) -> bool:
        return True

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
        if len(payload) > self._payload_bytes_max:
            raise PayloadTooLarge(
                subject=subject, size_bytes=len(payload), limit_bytes=self._payload_bytes_max
            )
        self.sent.append((subject, payload))
        delivery = Delivery(subject, payload, reply_to, headers)
        loop = asyncio.get_running_loop()
        for subscription in self._receivers(subject):
            loop.call_soon(subscription.handler, delivery)

    def _receivers(self, subject: str) -> list[_MemorySubscription]:
        tokens = subject.split(".")
        found: list[_MemorySubscription] = []
        groups: dict[tuple[str, str], list[_MemorySubscription]] = {}
        for subscription in self.subscriptions:
            if not matches(subscription.pattern, tokens):
                continue
            if subscription.queue:
                key = (subscription.queue, ".".join(subscription.pattern))
                groups.setdefault(key, []).append(subscription)
            else:
                found.append(subscription)
        for key, members in groups.items():
            turn = self._turn.get(key, 0)
            self._turn[key] = turn + 1
            found.append(members[turn % len(members)])
        return found

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        subscription = _MemorySubscription(self, subject, handler, queue)
        self.subscriptions.append(subscription)
        return subscription

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
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
        return self._kv.get(key, (None, 0))

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        if self._kv.get(key, (b"", 0))[1] != revision:
            return None
        self._revision += 1
        self._kv[key] = (value, self._revision)
        return self._revision

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
        self.subscriptions.clear()
