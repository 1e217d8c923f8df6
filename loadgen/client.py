"""Replays requests against an OpenAI-compatible server: open loop, or a closed loop of N.

Open loop: each request is sent when the trace says, whatever became of those before it, since
waiting for answers would hide the very overload a replay is to show. When ``connections_max`` are
in use a request is refused here and counted as such; it never waits in a queue of ours.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from loadgen import results
from loadgen.completion import ClientOptions, RequestWriter
from loadgen.pool import ConnectionPool, parse_url
from loadgen.results import RequestResult
from loadgen.stream import StreamReader
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid

_PUNCTUAL_S = 0.0005  # a timer is no finer than this; sooner than this is now
_SHORT_WAIT_S = 0.5  # waiting on the event costs twice a sleep

__all__ = ["ClientOptions", "Progress", "closed_loop", "replay"]


@dataclass(slots=True)
class Progress:
    """The state of a running replay, for whoever shows it; ``stop`` ends it early."""

    offered: int = 0
    completed: int = 0
    failed: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)


async def replay(
    records: Sequence[TraceRecord], options: ClientOptions, *, progress: Progress | None = None
) -> list[RequestResult]:
    """Send each record at its ``timestamp_s``; returns when all have ended, in their order."""
    async with asyncio.TaskGroup() as tasks:
        run = _Run(options, tasks, progress or Progress())
        try:
            await _send_on_time(run, records)
            await run.all_over()
        finally:
            await run.close()
    return run.results


async def closed_loop(
    records: Iterable[TraceRecord],
    options: ClientOptions,
    *,
    concurrency: int,
    progress: Progress | None = None,
) -> list[RequestResult]:
    """Keep ``concurrency`` requests in flight until the records are used up; timestamps are
    ignored. For measuring capacity; a latency at an offered load needs ``replay``."""
    if not 0 < concurrency <= options.connections_max:
        raise ConfigInvalid(
            field="concurrency",
            value=concurrency,
            remedy=f"use 1 to connections_max, which is {options.connections_max}",
        )
    async with asyncio.TaskGroup() as tasks:
        run = _Run(options, tasks, progress or Progress())
        run.next_record = iter(records)
        try:
            for _ in range(concurrency):
                if not run.send_next():
                    break
            await run.all_over()
        finally:
            await run.close()
    return run.results


async def _send_on_time(run: "_Run", records: Sequence[TraceRecord]) -> None:
    for record in records:
        if run.progress.stop.is_set():
            return
        request = run.prepared(record)  # before it is due, so that it leaves on time
        due_s = run.origin_s + record.timestamp_s
        delay_s = due_s - monotonic()
        if delay_s >= _PUNCTUAL_S and await _stopped_within(run.progress.stop, delay_s):
            return
        run.send(record, request)
        if delay_s < _PUNCTUAL_S:
            # We are late, or several are due at once: let answers be read, send the rest next.
            await asyncio.sleep(0)


async def _stopped_within(stop: asyncio.Event, delay_s: float) -> bool:
    if delay_s < _SHORT_WAIT_S:
        await asyncio.sleep(delay_s)
        return stop.is_set()
    try:
        async with asyncio.timeout(delay_s):
            await stop.wait()
    except TimeoutError:
        return False
    return True


class _Run:
    """One replay in progress: makes requests, hands them to the pool, collects results."""

    def __init__(
        self, options: ClientOptions, tasks: asyncio.TaskGroup, progress: Progress
    ) -> None:
        self._options, self._tasks, self.progress = options, tasks, progress
        self._loop = asyncio.get_running_loop()
        target = parse_url(options.url)
        self._writer = RequestWriter(options, target)
        self._pool = ConnectionPool(
            target,
            tasks,
            connections_max=options.connections_max,
            connect_timeout_s=options.connect_timeout_s,
        )
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._readers: dict[int, StreamReader] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.origin_s = monotonic()
        self.next_record: Iterator[TraceRecord] | None = None
        self.results: list[RequestResult] = []

    def prepared(self, record: TraceRecord) -> bytes:
        """The bytes of the request that will be sent next."""
        return self._writer.payload(record, len(self.results))

    def send(self, record: TraceRecord, request: bytes) -> None:
        options = self._options
        now_s = monotonic()
        result = RequestResult(
            index=len(self.results),
            scheduled_s=record.timestamp_s if self.next_record is None else now_s - self.origin_s,
            sent_s=now_s - self.origin_s,
            input_tokens=record.input_tokens,
            output_tokens_asked=record.output_tokens,
            label=record.label,
            tenant=record.tenant,
            slo_class=record.slo_class or options.slo_class or "standard",
        )
        self.results.append(result)
        reader = StreamReader(
            result,
            origin_s=self.origin_s,
            on_over=self._over,
            keep_tokens=options.keep_tokens,
            chunk_times_max=options.chunk_times_max,
        )
        progress = self.progress
        progress.offered += 1
        progress.in_flight += 1
        self._quiet.clear()
        self._readers[result.index] = reader
        self._timers[result.index] = self._loop.call_later(
            options.timeout_s, self._time_out, result.index
        )
        self._pool.submit(reader, request)
        progress.in_flight_max = max(progress.in_flight_max, progress.in_flight)

    def send_next(self) -> bool:
        """Closed loop: the next record, now; False when there are no more."""
        assert self.next_record is not None
        record = None if self.progress.stop.is_set() else next(self.next_record, None)
        if record is None:
            return False
        self.send(record, self.prepared(record))
        return True

    async def all_over(self) -> None:
        """Until no request is in flight, or ``progress.stop`` is set."""
        stop = self._tasks.create_task(self._stop_when_asked())
        try:
            await self._quiet.wait()
        finally:
            stop.cancel()

    async def _stop_when_asked(self) -> None:
        await self.progress.stop.wait()
        for index in list(self._readers):
            self._cut(index, results.STOPPED, "the replay was interrupted")

    async def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._pool.close()
        await asyncio.sleep(0)  # lets the aborted connections see their end

    def _time_out(self, index: int) -> None:
        self._cut(index, results.TIMED_OUT, f"no end within {self._options.timeout_s:g} s")

    def _cut(self, index: int, code: str, message: str) -> None:
        reader = self._readers.get(index)
        if reader is not None:
            self._pool.cancel(reader)
            self._over(reader, code, message)

    def _over(self, reader: StreamReader, code: str, message: str) -> None:
        result = reader.result
        if self._readers.pop(result.index, None) is None:
            return  # it had timed out
        self._timers.pop(result.index).cancel()
        result.error_code, result.error_message = code, message
        if code == results.NOT_SENT:
            result.sent_s = None
        elif result.e2e_s is None:
            result.e2e_s = monotonic() - self.origin_s - (result.sent_s or 0.0)
        progress = self.progress
        progress.in_flight -= 1
        if code == results.OK:
            progress.completed += 1
        else:
            progress.failed += 1
        if self.next_record is not None:
            # Through the loop: a server that refuses at once must not deepen the stack.
            self._loop.call_soon(self._refill)
        elif not self._readers:
            self._quiet.set()

    def _refill(self) -> None:
        if not self.send_next() and not self._readers:
            self._quiet.set()
