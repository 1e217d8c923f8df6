"""What every Bus promises, as one suite. Each implementation's tests subclass BusContract."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest

from shared.bus import Bus, Delivery, Handler
from shared.errors import BusUnavailable, DeadlineExceeded, PayloadTooLarge
from shared.subjects import EVENTS

WAIT_S = 5.0
PAYLOAD_BYTES_MAX = 8 << 20
Scenario = Callable[[Bus, Bus], Awaitable[None]]


class Inbox:
    """Collects deliveries, and waits for a number of them."""

    def __init__(self) -> None:
        self.got: list[Delivery] = []
        self._more = asyncio.Event()

    def handle(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        self._more.set()

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.got]

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.got) < number:
                self._more.clear()
                await self._more.wait()


async def settle(bus: Bus) -> None:
    """Return when whatever was published on ``bus`` before has been delivered to it."""
    inbox = Inbox()
    subscription = await bus.subscribe("settle.here", inbox.handle)
    await bus.publish("settle.here", b"")
    await inbox.wait_for(1)
    await subscription.unsubscribe()


def answering(bus: Bus, answer: bytes) -> tuple[Handler, list[asyncio.Task[None]]]:
    """A handler that replies; the tasks are kept until the test ends."""
    tasks: list[asyncio.Task[None]] = []

    def handle(delivery: Delivery) -> None:
        reply = bus.publish(delivery.reply_to, answer + delivery.payload)
        tasks.append(asyncio.ensure_future(reply))

    return handle, tasks


class BusContract:
    """``pair`` opens two buses on one broker: two processes that talk to each other. For a bus
    that lives in one process both are the same."""

    def pair(self) -> AbstractAsyncContextManager[tuple[Bus, Bus]]:
        raise AssertionError("the subclass opens its own implementation")

    def _run(self, scenario: Scenario) -> None:
        async def main() -> None:
            async with self.pair() as (ours, theirs):
                await scenario(ours, theirs)

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("pattern", "subject", "matches"),
        [
            ("a.b.c", "a.b.c", True),
            ("a.b.c", "a.b", False),
            ("a.b", "a.b.c", False),
            ("a.*.c", "a.b.c", True),
            ("a.*.c", "a.c", False),
            ("a.*", "a.b.c", False),
            ("a.>", "a.b.c", True),
            ("a.>", "a", False),
            (">", "a", True),
            ("*.b.>", "a.b.c.d", True),
        ],
    )
    def test_wildcards(self, pattern: str, subject: str, matches: bool) -> None:
        """A service would miss its messages, or get those of others."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            inbox = Inbox()
            await theirs.subscribe(pattern, inbox.handle)
            await settle(theirs)
            await ours.publish(subject, b"x", reply_to="r.e", headers={"k": "v"})
            await settle(ours)
            await settle(theirs)
            got = [d for d in inbox.got if d.subject != "settle.here"]
            assert bool(got) is matches
            for delivery in got:
                assert (delivery.subject, delivery.payload) == (subject, b"x")
                assert delivery.reply_to == "r.e"
                assert dict(delivery.headers or {}) == {"k": "v"}

        self._run(scenario)

    def test_order_of_one_publisher(self) -> None:
        """Token chunks of one worker would look like gaps, and be made again elsewhere."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            inbox = Inbox()
            await theirs.subscribe("order.*", inbox.handle)
            await settle(theirs)
            sent = [str(i).encode() for i in range(200)]
            for payload in sent:
                await ours.publish("order.x", payload)
            await inbox.wait_for(len(sent))
            assert inbox.payloads == sent

        self._run(scenario)

    def test_every_plain_subscriber_gets_every_message(self) -> None:
        """Of two routers only one would learn the plan in force."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            first, second = Inbox(), Inbox()
            await theirs.subscribe("all.x", first.handle)
            await ours.subscribe("all.x", second.handle)
            await settle(theirs)
            await ours.publish("all.x", b"1")
            await first.wait_for(1)
            await second.wait_for(1)

        self._run(scenario)

    def test_queue_group_delivers_once(self) -> None:
        """Two routers would both answer one question, or none would."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            members = [Inbox(), Inbox(), Inbox()]
            for bus, inbox in zip((ours, theirs, theirs), members, strict=True):
                await bus.subscribe("work.x", inbox.handle, queue="group")
            other = Inbox()
            await theirs.subscribe("work.*", other.handle, queue="another")
            await settle(ours)
            await settle(theirs)
            for i in range(300):
                await ours.publish("work.x", str(i).encode())
            await other.wait_for(300)
            await settle(ours)
            await settle(theirs)
            got = [int(p) for inbox in members for p in inbox.payloads]
            assert sorted(got) == list(range(300))
            assert all(inbox.got for inbox in members)

        self._run(scenario)

    def test_one_queue_group_over_overlapping_subjects(self) -> None:
        """A member subscribed by wildcard would answer a second time what another answered."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            exact, wild = Inbox(), Inbox()
            await theirs.subscribe("overlap.x", exact.handle, queue="group")
            await theirs.subscribe("overlap.*", wild.handle, queue="group")
            await settle(theirs)
            for i in range(40):
                await ours.publish("overlap.x", str(i).encode())
            await settle(ours)
            await settle(theirs)
            assert len(exact.got) + len(wild.got) == 40

        self._run(scenario)

    def test_unsubscribe_ends_delivery_and_is_idempotent(self) -> None:
        """A finished request would go on being fed, and ending it twice would crash."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            inbox = Inbox()
            subscription = await theirs.subscribe("gone.x", inbox.handle)
            await settle(theirs)
            await subscription.unsubscribe()
            await subscription.unsubscribe()
            await settle(theirs)
            await ours.publish("gone.x", b"1")
            await settle(ours)
            await settle(theirs)
            assert inbox.got == []

        self._run(scenario)

    def test_request_and_reply(self) -> None:
        """`oserve status` could ask nobody anything."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            handle, tasks = answering(theirs, b"re:")
            await theirs.subscribe("ask.*", handle)
            await settle(theirs)
            answers = await asyncio.gather(
                *(ours.request("ask.x", str(i).encode(), timeout_s=WAIT_S) for i in range(20))
            )
            assert answers == [f"re:{i}".encode() for i in range(20)]
            await asyncio.gather(*tasks)

        self._run(scenario)

    def test_request_without_answer_in_time(self) -> None:
        """A silent service would hang whoever asks it."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            await theirs.subscribe("silent.x", lambda _delivery: None)
            await settle(theirs)
            with pytest.raises(DeadlineExceeded, match=r"silent\.x within 0\.05 s"):
                await ours.request("silent.x", b"", timeout_s=0.05)

        self._run(scenario)

    def test_request_without_listener(self) -> None:
        """Asking a service that does not run would wait for the timeout for nothing."""

        async def scenario(ours: Bus, _theirs: Bus) -> None:
            with pytest.raises(BusUnavailable, match=r"nobody answers nobody\.x"):
                await ours.request("nobody.x", b"", timeout_s=WAIT_S)

        self._run(scenario)

    def test_compare_and_set(self) -> None:
        """Two switchers could both put a plan in force."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            assert await ours.load("plan") == (None, 0)
            first = await ours.store("plan", b"one", revision=0)
            assert first is not None
            assert await theirs.load("plan") == (b"one", first)
            assert await theirs.store("plan", b"late", revision=0) is None
            second = await theirs.store("plan", b"two", revision=first)
            assert second is not None
            assert second > first
            assert await ours.store("plan", b"stale", revision=first) is None
            assert await ours.load("plan") == (b"two", second)

        self._run(scenario)

    def test_only_one_of_many_writers_wins(self) -> None:
        """A race for an epoch would have two winners."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            revisions = await asyncio.gather(
                *(
                    bus.store("race", str(i).encode(), revision=0)
                    for i, bus in enumerate((ours, theirs) * 5)
                )
            )
            assert len([r for r in revisions if r is not None]) == 1

        self._run(scenario)

    def test_keys_do_not_meet(self) -> None:
        """The profiler's state would conflict with the plan's revisions."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            plan = await ours.store("plan", b"p", revision=0)
            assert await ours.store("types", b"t", revision=0) is not None
            assert plan is not None
            assert await theirs.store("plan", b"p2", revision=plan) is not None

        self._run(scenario)

    def test_history_is_the_newest_events_of_a_subject(self) -> None:
        """`oserve why` would tell of another replica, of last week, or of nothing at all."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            events = EVENTS.removesuffix(">")
            assert await ours.history(f"{events}plan.kept", limit=5) == []
            for i in range(300):
                await ours.publish(f"{events}a.{i % 3}", str(i).encode())
                if i == 149:
                    await settle(ours)
                    await asyncio.sleep(0.05)
            await ours.publish("elsewhere.a.0", b"no event")
            await settle(ours)
            async with asyncio.timeout(WAIT_S):  # the journal takes them a moment later
                while len(await theirs.history(f"{events}a.*", limit=1000)) < 300:
                    await asyncio.sleep(0.01)
            for limit in (1, 7, 100, 101):
                found = await theirs.history(f"{events}a.1", limit=limit)
                assert [int(kept.payload) for kept in found] == list(range(1, 300, 3))[-limit:]
                assert {kept.subject for kept in found} == {f"{events}a.1"}
            everything = await theirs.history(EVENTS, limit=1000)
            assert [int(kept.payload) for kept in everything] == list(range(300))
            middle_s = everything[150].at_s
            later = await theirs.history(f"{events}a.*", limit=1000, since_s=middle_s - 0.02)
            assert [int(kept.payload) for kept in later] == list(range(150, 300))
            last = await theirs.history(f"{events}a.2", limit=3, since_s=middle_s - 0.02)
            assert [int(kept.payload) for kept in last] == [293, 296, 299]
            assert await theirs.history("elsewhere.>", limit=1) == []

        self._run(scenario)

    def test_payload_at_the_cap_and_over_it(self) -> None:
        """A huge prompt would close the worker's connection instead of failing one request."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            cap = ours.payload_bytes_max
            assert cap == PAYLOAD_BYTES_MAX
            inbox = Inbox()
            await theirs.subscribe("big.x", inbox.handle)
            await settle(theirs)
            await ours.publish("big.x", bytes(cap))
            await inbox.wait_for(1)
            with pytest.raises(PayloadTooLarge) as caught:
                await ours.publish("big.x", bytes(cap + 1))
            error = caught.value
            assert (error.subject, error.size_bytes, error.limit_bytes) == ("big.x", cap + 1, cap)
            assert "raise max_payload" in str(error)
            with pytest.raises(PayloadTooLarge):
                await ours.store("big", bytes(cap + 1), revision=0)
            assert ours.connected
            await ours.publish("big.x", b"still here")
            await inbox.wait_for(2)

        self._run(scenario)

    def test_close_is_idempotent_and_final(self) -> None:
        """A second SIGTERM would crash the shutdown, or a late publish vanish unnoticed."""

        async def scenario(ours: Bus, _theirs: Bus) -> None:
            assert ours.connected
            await ours.close()
            await ours.close()
            assert not ours.connected
            with pytest.raises(BusUnavailable):
                await ours.publish("late.x", b"")
            with pytest.raises(BusUnavailable):
                await ours.subscribe("late.x", lambda _delivery: None)

        self._run(scenario)

    def test_close_flushes(self) -> None:
        """The last report of a leaving worker would be lost."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            inbox = Inbox()
            await theirs.subscribe("last.x", inbox.handle)
            await settle(theirs)
            for i in range(50):
                await ours.publish("last.x", str(i).encode())
            await ours.close()
            await inbox.wait_for(50)

        self._run(scenario)

    def test_a_handler_that_fails_harms_nobody_else(self) -> None:
        """One bad message would silence a service's other subscriptions."""

        async def scenario(ours: Bus, theirs: Bus) -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _loop, _context: None)

            def fail(_delivery: Delivery) -> None:
                raise ValueError("handler")

            inbox = Inbox()
            await theirs.subscribe("bad.x", fail)
            await theirs.subscribe("bad.*", inbox.handle)
            await settle(theirs)
            await ours.publish("bad.x", b"1")
            await ours.publish("bad.x", b"2")
            await inbox.wait_for(2)

        self._run(scenario)

    def test_register(self) -> None:
        """A service could not join discovery."""

        async def scenario(ours: Bus, _theirs: Bus) -> None:
            await ours.register(
                name="oserve-test", version="1.2.3", description="a test", metadata={"k": "v"}
            )

        self._run(scenario)
