"""What callbacks of the event loop publish: sent in order by one task, so that a callback never
waits for the broker. Bounded: what does not fit is lost as any message can be, and the deadline
of its phase repeats it.
"""

import asyncio
import logging
from collections import deque
from contextlib import suppress

from shared.bus import Bus
from shared.errors import BusUnavailable, PayloadTooLarge
from shared.telemetry import Metrics

log = logging.getLogger("oserve.ingress")

OUTBOX_MAX = 65_536


class Outbox:
    def __init__(self, bus: Bus, metrics: Metrics) -> None:
        self._bus = bus
        self._waiting: deque[tuple[str, bytes, str, dict[str, str] | None]] = deque()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._failing = False
        self._dropped = metrics.counter("ingress_outbox_dropped", "Messages the outbox refused")
        self._failed = metrics.counter("ingress_publish_failed", "Messages the bus did not take")

    def put(
        self, subject: str, payload: bytes, *, reply_to: str, headers: dict[str, str] | None
    ) -> None:
        if len(self._waiting) >= OUTBOX_MAX:
            self._dropped.inc()
            return
        self._waiting.append((subject, payload, reply_to, headers))
        self._filled.set()
        self._empty.clear()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            while self._waiting:
                subject, payload, reply_to, headers = self._waiting.popleft()
                try:
                    await self._bus.publish(subject, payload, reply_to=reply_to, headers=headers)
                    self._failing = False
                except (BusUnavailable, PayloadTooLarge) as error:
                    self._on_failed(subject, error)
            self._empty.set()
            self._filled.clear()
            await self._filled.wait()

    async def flush(self, timeout_s: float) -> None:
        """Wait until the bus has taken everything, or ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def _on_failed(self, subject: str, error: BusUnavailable | PayloadTooLarge) -> None:
        """Count each, log the first in a row: a broker that is away fails thousands a second."""
        self._failed.inc()
        if not self._failing:
            log.warning("publish.failed", extra={"subject": subject, "error": str(error)})
        self._failing = True
