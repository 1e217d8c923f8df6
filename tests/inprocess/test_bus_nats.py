# pyright: reportUnknownMemberType=false
# (nats-py leaves parts of its signatures untyped)
"""The bus on a real nats-server: the contract, and what only a real broker can do."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.bus import Bus, BusConfig, NatsBus
from shared.bus_storage import EVENT_STREAM
from shared.errors import BusUnavailable, ConfigInvalid, PayloadTooLarge
from shared.subjects import EVENTS
from tests.support.broker import Broker, free_port
from tests.unit.bus_contract import BusContract, Inbox, settle

pytestmark = pytest.mark.nats


@asynccontextmanager
async def connected(url: str, **settings: Any) -> AsyncGenerator[NatsBus]:  # of BusConfig
    bus = NatsBus(msgspec.convert({"url": url, "connect_timeout_s": 5.0, **settings}, BusConfig))
    await bus.connect(name="test")
    try:
        yield bus
    finally:
        await bus.close()


async def _until(condition: Any, what: str) -> None:  # a callable, sync or async
    deadline_s = time.monotonic() + 20.0
    while time.monotonic() < deadline_s:
        answer = condition()
        if await answer if asyncio.iscoroutine(answer) else answer:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not reached: {what}")


class TestNatsBus(BusContract):
    """The contract, on a broker that all of these tests share."""

    @pytest.fixture(autouse=True)
    def _broker(self, shared_nats_server: Broker) -> None:
        self._url = shared_nats_server.url

    def pair(self) -> AbstractAsyncContextManager[tuple[Bus, Bus]]:
        @asynccontextmanager
        async def opened() -> AsyncGenerator[tuple[Bus, Bus]]:
            async with connected(self._url) as ours, connected(self._url) as theirs:
                await _forget_state(ours)
                yield ours, theirs

        return opened()


async def _forget_state(bus: NatsBus) -> None:
    jetstream = bus.client.jetstream()
    await jetstream.purge_stream("KV_OSERVE_STATE")
    await jetstream.purge_stream(EVENT_STREAM)


def test_reconnects_to_a_restarted_broker_with_all_it_had(nats_server: Broker) -> None:
    """A broker that crashes and comes back would leave every service deaf, or without its plan."""

    async def main() -> None:
        async with connected(nats_server.url) as ours, connected(nats_server.url) as theirs:
            inbox, group = Inbox(), Inbox()
            await theirs.subscribe("after.*", inbox.handle)
            await theirs.subscribe("queue.x", group.handle, queue="g")
            revision = await ours.store("plan", b"kept", revision=0)
            assert revision is not None
            nats_server.kill()
            await _until(lambda: not ours.connected and not theirs.connected, "disconnected")
            await ours.publish("after.buffered", b"sent while away")
            nats_server.start()
            await _until(lambda: ours.connected and theirs.connected, "connected again")
            await settle(theirs)
            await ours.publish("after.x", b"1")
            await ours.publish("queue.x", b"2")
            await _until(lambda: b"1" in inbox.payloads, "the subscription survives")
            await group.wait_for(1)
            assert await theirs.load("plan") == (b"kept", revision)
            assert await theirs.store("plan", b"next", revision=revision) is not None

    asyncio.run(main())


def test_state_fails_fast_while_the_broker_is_away(nats_server: Broker) -> None:
    """A core would wait for its plan without end, and nobody be told why."""

    async def main() -> None:
        async with connected(nats_server.url, state_timeout_s=0.2) as bus:
            nats_server.kill()
            await _until(lambda: not bus.connected, "disconnected")
            with pytest.raises(BusUnavailable, match="cannot read state plan"):
                await bus.load("plan")
            with pytest.raises(BusUnavailable, match="cannot write state plan"):
                await bus.store("plan", b"", revision=0)

    asyncio.run(main())


def test_what_is_published_while_the_broker_is_away_is_bounded(nats_server: Broker) -> None:
    """A service would grow without limit while the broker is down."""

    async def main() -> None:
        async with connected(nats_server.url, pending_bytes_max=1 << 16) as bus:
            nats_server.kill()
            await _until(lambda: not bus.connected, "disconnected")
            for _ in range(60):
                await bus.publish("a.b", bytes(1 << 10))
            with pytest.raises(BusUnavailable, match="cannot publish on a"):
                await bus.publish("a.b", bytes(8 << 10))

    asyncio.run(main())


def test_connect_refused_names_cause_and_remedy() -> None:
    """Without a broker a service would hang, or die with a stack trace."""
    port = free_port()

    async def main() -> None:
        bus = NatsBus(BusConfig(url=f"nats://user:secret@127.0.0.1:{port}", connect_timeout_s=0.3))
        async with asyncio.timeout(3.0):
            with pytest.raises(BusUnavailable) as caught:
                await bus.connect(name="test")
        text = str(caught.value)
        assert f"no broker at 127.0.0.1:{port} within 0.3 s" in text
        assert "start one with `oserve up`" in text
        assert "secret" not in text
        await bus.close()

    asyncio.run(main())


def test_waits_for_a_broker_that_starts_late(nats_server: Broker) -> None:
    """Services started together with their broker would die before it listens."""
    nats_server.stop()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        starting = loop.call_later(0.3, nats_server.start)
        async with connected(nats_server.url) as bus:
            assert bus.connected
        starting.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["nats://127.0.0.1:port", "nats://", "nats://127.0.0.1:99999"])
def test_malformed_url_is_a_setting_error(url: str) -> None:
    """A misspelt URL would be retried for ever as if the broker were away."""

    async def main() -> None:
        with pytest.raises(ConfigInvalid) as caught:
            await NatsBus(BusConfig(url=url, connect_timeout_s=0.1)).connect(name="test")
        assert caught.value.field == "bus.url"

    asyncio.run(main())


def test_jetstream_disabled_is_said(tmp_path: Path) -> None:
    """A broker without a store would fail each Load later, one by one, without a reason."""
    broker = Broker(tmp_path, jetstream=False)
    broker.start()

    async def main() -> None:
        with pytest.raises(BusUnavailable, match=r"JetStream .* \(-js\)"):
            async with connected(broker.url):
                pass

    try:
        asyncio.run(main())
    finally:
        broker.stop()


def test_wrong_password_is_said_at_once(tmp_path: Path) -> None:
    """A wrong password would be tried for ever, in silence."""
    broker = Broker(tmp_path, password="right")
    broker.start()

    async def main() -> None:
        async with asyncio.timeout(5.0):
            with pytest.raises(BusUnavailable, match=r"Authorization.*bus\.password"):
                async with connected(broker.url, user="oserve", password="wrong"):
                    pass
        async with connected(broker.url, user="oserve", password="right") as bus:
            assert bus.connected

    try:
        asyncio.run(main())
    finally:
        broker.stop()


def test_headers_count_against_the_cap(shared_nats_server: Broker) -> None:
    """The broker would hang up on a worker whose message fits but for its trace headers."""

    async def main() -> None:
        async with connected(shared_nats_server.url) as bus:
            headers = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
            with pytest.raises(PayloadTooLarge):
                await bus.publish("big.x", bytes(bus.payload_bytes_max), headers=headers)
            fits = bus.payload_bytes_max - len("NATS/1.0\r\n\r\n") - len("traceparent: \r\n") - 55
            await bus.publish("big.x", bytes(fits), headers=headers)
            await settle(bus)
            assert bus.connected

    asyncio.run(main())


def test_a_deleted_key_can_be_written_again(nats_server: Broker) -> None:
    """After `nats kv del` the switcher would conflict with nobody for ever."""

    async def main() -> None:
        async with connected(nats_server.url) as bus:
            assert await bus.store("plan", b"one", revision=0) is not None
            bucket = await bus.client.jetstream().key_value("OSERVE_STATE")
            await bucket.delete("plan")
            value, revision = await bus.load("plan")
            assert value is None
            assert await bus.store("plan", b"two", revision=revision) is not None
            assert (await bus.load("plan"))[0] == b"two"

    asyncio.run(main())


def test_registered_service_answers_the_official_protocol(nats_server: Broker) -> None:
    """The `nats micro` command could not list, describe or ping our services."""

    async def main() -> None:
        async with connected(nats_server.url) as bus, connected(nats_server.url) as asking:
            await bus.register(
                name="oserve-router", version="1.2.3", description="routes", metadata={"pid": "7"}
            )
            for verb in ("PING", "INFO", "STATS"):
                answers = [
                    msgspec.json.decode(await asking.request(subject, b"", timeout_s=5.0))
                    for subject in (f"$SRV.{verb}", f"$SRV.{verb}.oserve-router")
                ]
                for answer in answers:
                    assert answer["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
                    assert (answer["name"], answer["version"]) == ("oserve-router", "1.2.3")
                    assert answer["metadata"] == {"pid": "7"}
                    assert answer["id"]
            (found,) = await asking.services()
            assert found["description"] == "routes"

    asyncio.run(main())


def test_a_closed_service_leaves_discovery(nats_server: Broker) -> None:
    """`oserve status` would show services that ended."""

    async def main() -> None:
        async with connected(nats_server.url) as asking:
            async with connected(nats_server.url) as bus:
                await bus.register(name="s", version="1.0.0", description="", metadata={})
                assert len(await asking.services()) == 1
            assert await asking.services() == []

    asyncio.run(main())


def test_journal_keeps_events_and_only_events(nats_server: Broker) -> None:
    """The journal would miss what happened, or fill up with data that is worthless later."""

    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.publish(EVENTS.replace(">", "plan.kept"), b"kept")
            await bus.publish(EVENTS.replace("evt.>", "data.worker.w.report"), b"not kept")
            jetstream = bus.client.jetstream()

            async def stored() -> bool:
                return (await jetstream.stream_info(EVENT_STREAM)).state.messages == 1

            await _until(stored, "one event in the journal")
            message = await jetstream.get_msg(EVENT_STREAM, seq=1)
            assert message.data == b"kept"
            assert (await jetstream.stream_info(EVENT_STREAM)).config.subjects == [EVENTS]

    asyncio.run(main())


def test_journal_is_bounded_and_the_newest_stays(nats_server: Broker) -> None:
    """The journal would fill the disk, or refuse new events when full."""

    async def main() -> None:
        limit_bytes = 64 << 10
        async with connected(
            nats_server.url, journal_bytes_max=limit_bytes, journal_age_s_max=3600.0
        ) as bus:
            subject = EVENTS.replace(">", "plan.kept")
            for i in range(200):
                await bus.publish(subject, i.to_bytes(2) + bytes(1 << 10))
            jetstream = bus.client.jetstream()

            async def arrived() -> bool:
                return (await jetstream.stream_info(EVENT_STREAM)).state.last_seq == 200

            await _until(arrived, "all events reached the journal")
            info = await jetstream.stream_info(EVENT_STREAM)
            assert info.state.bytes <= limit_bytes
            assert info.config.max_age == 3600.0
            newest = await jetstream.get_msg(EVENT_STREAM, seq=200)
            assert newest.data is not None
            assert int.from_bytes(newest.data[:2]) == 199

    asyncio.run(main())


def test_new_limits_reach_an_existing_journal(nats_server: Broker) -> None:
    """A changed journal limit would keep every service from starting."""

    async def main() -> None:
        async with connected(nats_server.url, journal_bytes_max=1 << 20):
            pass
        async with connected(nats_server.url, journal_bytes_max=2 << 20) as bus:
            info = await bus.client.jetstream().stream_info(EVENT_STREAM)
            assert info.config.max_bytes == 2 << 20

    asyncio.run(main())


def test_a_broker_away_is_said_once_and_leaving_not_at_all(
    nats_server: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten warnings a second would bury the cause, and one at each normal end teaches to ignore."""

    async def main() -> None:
        async with connected(nats_server.url) as bus:
            nats_server.kill()
            await _until(lambda: not bus.connected, "disconnected")
            await asyncio.sleep(1.0)  # about ten attempts
            nats_server.start()
            await _until(lambda: bus.connected, "reconnected")
            texts = [record.getMessage() for record in caplog.records]
            assert texts.count("bus.disconnected") == 1
            assert 1 <= texts.count("bus.error") <= 3  # reset, end of stream, refused
            caplog.clear()
        assert "bus.disconnected" not in [record.getMessage() for record in caplog.records]

    asyncio.run(main())


def test_closing_a_bus_that_never_connected() -> None:
    """A service whose broker never came would crash again while it ends."""

    async def main() -> None:
        bus = NatsBus(BusConfig())
        async with asyncio.timeout(1.0):
            await bus.close()
        await bus.close()

    asyncio.run(main())
