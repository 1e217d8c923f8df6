"""Collects token chunks, and sends one message per ingress instead of one per chunk.

Engines flush it after each step. Whatever else is put in (acknowledgements, refusals, heartbeats)
travels with the next step's chunks, or after ``delay_s`` if none comes.
"""

import asyncio
import logging

from shared.bus import Bus
from shared.errors import BusUnavailable, PayloadTooLarge
from shared.messages.base import encode
from shared.messages.requests import TokenChunk, TokenChunks
from shared.telemetry import Metrics

log = logging.getLogger("oserve.worker")

CHUNKS_MAX = 1024  # in one message, to stay far below a broker's max_payload


class Outbox:
    def __init__(self, bus: Bus, *, incarnation: str, delay_s: float, metrics: Metrics) -> None:
        self._bus, self._incarnation, self._delay_s = bus, incarnation, delay_s
        self._pending: dict[tuple[str, str], list[TokenChunk]] = {}
        self._signed: dict[tuple[str, str], str] = {}  # what next goes there says at which worker
        self._filled = asyncio.Event()
        self._flushing = False
        self._endings = metrics.counter(
            "attempts_ended_by_worker",
            "Attempts refused, handed back or lost with their engine",
            ["finish", "failure"],
        )
        self._lost = metrics.counter("chunks_lost", "Token chunks that the bus did not take")

    def put(self, subject: str, message: TokenChunks) -> None:
        """A message without chunks (a heartbeat) is sent as well, unless chunks go anyway."""
        self.batch(subject, message.replica_id).extend(message.chunks)
        if message.worker_id:
            self._signed[subject, message.replica_id] = message.worker_id
        self._filled.set()
        for chunk in message.chunks:
            if chunk.finish is not None:
                self._endings.labels(chunk.finish, chunk.failure or "").inc()

    def batch(self, subject: str, replica_id: str) -> list[TokenChunk]:
        """The list that the next flush sends on ``subject``: append to it, then flush."""
        key = (subject, replica_id)
        batch = self._pending.get(key)
        if batch is None:
            batch = self._pending[key] = []
        return batch

    async def flush(self) -> None:
        """Send all there is, in order: a flush during a flush leaves its chunks to the first."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._pending:
                pending, self._pending = self._pending, {}
                signed, self._signed = self._signed, {}
                for key, chunks in pending.items():
                    await self._send(key, chunks, worker_id=signed.get(key, ""))
        finally:
            self._flushing = False

    async def run(self) -> None:
        """Send what no step has taken along, until cancelled."""
        while True:
            await self._filled.wait()
            await asyncio.sleep(self._delay_s)
            self._filled.clear()
            await self.flush()

    async def _send(
        self, key: tuple[str, str], chunks: list[TokenChunk], *, worker_id: str
    ) -> None:
        subject, replica_id = key
        for start in range(0, max(1, len(chunks)), CHUNKS_MAX):
            part = chunks if len(chunks) <= CHUNKS_MAX else chunks[start : start + CHUNKS_MAX]
            message = TokenChunks(
                replica_id=replica_id,
                incarnation=self._incarnation,
                chunks=part,
                worker_id=worker_id,
            )
            try:
                await self._bus.publish(subject, encode(message))
            except (BusUnavailable, PayloadTooLarge) as error:
                # Its ingress will see the gap, and resubmit.
                self._lost.inc(len(part))
                log.warning("chunks.lost", extra={"subject": subject, "error": str(error)})
