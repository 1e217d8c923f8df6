"""The outbox: few messages, in order, none too large."""

import asyncio
from collections.abc import Awaitable, Callable

from services.worker.outbox import CHUNKS_MAX, Outbox
from shared.bus_memory import MemoryBus
from shared.messages.base import decode
from shared.messages.requests import TokenChunk, TokenChunks
from shared.telemetry import Metrics


def chunk(n: int) -> TokenChunk:
    return TokenChunk(request_id=f"q{n}", attempt=0)


def make(bus: MemoryBus) -> Outbox:
    return Outbox(bus, incarnation="run", delay_s=0.001, metrics=Metrics("worker"))


def message(*chunks: TokenChunk) -> TokenChunks:
    return TokenChunks(replica_id="r1", incarnation="run", chunks=list(chunks))


def sent(bus: MemoryBus) -> list[tuple[str, TokenChunks]]:
    return [(subject, decode(payload, TokenChunks)) for subject, payload in bus.sent]


def run(scenario: Callable[[MemoryBus], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(MemoryBus())

    asyncio.run(main())


def test_acknowledgements_travel_with_the_step() -> None:
    """Otherwise each request would cost the broker and the ingress one more message."""

    async def scenario(bus: MemoryBus) -> None:
        outbox = make(bus)
        outbox.put("i0", message(chunk(0)))
        outbox.batch("i0", "r1").append(chunk(1))
        outbox.batch("i1", "r1").append(chunk(2))
        await outbox.flush()
        assert [(to, [c.request_id for c in m.chunks]) for to, m in sent(bus)] == [
            ("i0", ["q0", "q1"]),
            ("i1", ["q2"]),
        ]

    run(scenario)


def test_what_no_step_takes_along_goes_by_itself() -> None:
    """Otherwise acknowledgements would wait behind a long step, past the ingress's patience."""

    async def scenario(bus: MemoryBus) -> None:
        outbox = make(bus)
        sender = asyncio.create_task(outbox.run())
        outbox.put("i0", message())
        async with asyncio.timeout(5):
            while not bus.sent:  # the bus tells nobody
                await asyncio.sleep(0.001)
        sender.cancel()
        assert sent(bus)[0][1].chunks == []  # a heartbeat

    run(scenario)


def test_large_batches_are_split_in_order() -> None:
    """Otherwise a drain of many requests would exceed the broker's max_payload."""

    async def scenario(bus: MemoryBus) -> None:
        outbox = make(bus)
        outbox.put("i0", message(*(chunk(n) for n in range(CHUNKS_MAX + 5))))
        await outbox.flush()
        assert [len(m.chunks) for _, m in sent(bus)] == [CHUNKS_MAX, 5]

    run(scenario)


def test_message_the_bus_refuses_does_not_end_the_worker() -> None:
    """Otherwise one oversized message would take a whole replica down."""

    async def scenario(bus: MemoryBus) -> None:
        outbox = make(bus)
        outbox.put("i0", message(TokenChunk(request_id="q", attempt=0, detail="x" * 200)))
        outbox.put("i1", message(chunk(1)))
        await outbox.flush()
        assert [to for to, _ in sent(bus)] == ["i1"]

    asyncio.run(scenario(MemoryBus(payload_bytes_max=100)))
