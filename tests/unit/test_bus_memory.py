"""The in-memory bus keeps the contract of the real one, so that tests on it mean something."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from shared.bus import Bus
from shared.bus_memory import MemoryBus
from shared.errors import PayloadTooLarge
from tests.unit.bus_contract import BusContract


class TestMemoryBus(BusContract):
    """The contract, on the bus inside one event loop."""

    def pair(self) -> AbstractAsyncContextManager[tuple[Bus, Bus]]:
        @asynccontextmanager
        async def opened() -> AsyncGenerator[tuple[Bus, Bus]]:
            bus = MemoryBus()
            yield bus, bus
            await bus.close()

        return opened()

    def test_close_flushes(self) -> None:
        """A test could not see the last message of a core that ended."""

        async def main() -> None:
            bus = MemoryBus()  # both sides: the contract's receiver would be closed too
            got: list[bytes] = []
            await bus.subscribe("a", lambda delivery: got.append(delivery.payload))
            await bus.publish("a", b"1")
            await bus.close()
            assert got == [b"1"]

        asyncio.run(main())


def test_what_was_sent_can_be_looked_at() -> None:
    """Tests could not tell what a service published."""

    async def main() -> None:
        bus = MemoryBus(payload_bytes_max=4)
        await bus.publish("a.b", b"1")
        with pytest.raises(PayloadTooLarge):
            await bus.publish("a.b", b"12345")
        await bus.register(name="n", version="1.0.0", description="d", metadata={})
        assert list(bus.sent) == [("a.b", b"1")]
        assert bus.registered == [("n", "1.0.0", "d", {})]

    asyncio.run(main())
