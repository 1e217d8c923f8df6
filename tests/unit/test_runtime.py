"""The runtime on the in-memory bus, driving small cores."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import pytest

from shared import subjects
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.core import (
    Ask,
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    Reply,
    SetTimer,
    Start,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.errors import BusUnavailable
from shared.messages.base import Message, decode, encode
from shared.messages.plans import DeploymentPlan, PlanInForce, PlanKept
from shared.messages.replicas import ReplicaStarted, ReplicaStopped
from shared.messages.requests import RouteReply, RouteRequest
from shared.runtime import Job, Runtime, Wiring
from shared.telemetry import Metrics, TelemetryConfig, Tracing
from tests.support.otlp import collector

WAIT_S = 5.0
STARTED = subjects.REPLICA_STARTED
KEPT = subjects.PLAN_KEPT


class Tick(Message, frozen=True, kw_only=True):
    number: int = 0


@dataclass
class RecordingCore:
    """Remembers its events; ``react`` says what to do about them."""

    react: Callable[[Any], list[Effect]] = lambda _event: []
    events: list[Any] = field(default_factory=list[Any])
    checks: int = 0

    def step(self, event: Any, now_s: float) -> list[Effect]:
        assert now_s >= 0.0
        self.events.append(event)
        return self.react(event)

    def check(self) -> None:
        self.checks += 1

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Driven:
    """A core under a runtime on a bus of its own, while the ``async with`` block runs."""

    def __init__(
        self, core: RecordingCore, bus: MemoryBus | None = None, otlp: str = "", **wiring: Any
    ) -> None:
        self.core, self.bus = core, bus or MemoryBus()
        self.metrics = Metrics("test")
        self.stopping = asyncio.Event()
        config = TelemetryConfig(otlp_endpoint=otlp)
        self.tracing = Tracing(config, service="test", instance_id="test-1")
        self.runtime = Runtime(
            core, Wiring(**wiring), bus=self.bus, clock=SystemClock(), metrics=self.metrics,
            tracing=self.tracing,
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.runtime.run(self.stopping))
        await self.until(lambda: bool(self.core.of(Started)))
        return self

    async def __aexit__(self, *error: object) -> None:
        if error[0] is not None:
            self.task.cancel()
            return
        self.stopping.set()
        async with asyncio.timeout(WAIT_S):
            await self.task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                if self.task.done():
                    await self.task
                await asyncio.sleep(0.001)

    async def send(self, subject: subjects.Subject[Any], message: Message, **more: Any) -> None:
        await self.bus.publish(subject.pattern, encode(message), **more)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"oserve_{name}_total", labels) or 0.0


def _started(number: int) -> ReplicaStarted:
    return ReplicaStarted(epoch=number, worker_id="w", replica_id="r")


def _in_force(epoch: int) -> PlanInForce:
    return PlanInForce(epoch=epoch, plan=DeploymentPlan(plan_id="p"))


def _question(number: int = 0) -> RouteRequest:
    return RouteRequest(request_id=f"q{number}", model_id="m", input_tokens=1, output_tokens_max=1)


def _request_id(query: Query) -> str:
    return cast("RouteRequest", query.message).request_id


def _tick(_argument: object) -> Tick:
    return Tick()


def _run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_started_comes_first_then_messages_in_order() -> None:
    """A core would act on messages before it asked for its stored state."""

    async def scenario() -> None:
        core = RecordingCore()
        driven = Driven(core, inputs=(STARTED,))
        async with driven:
            for number in range(5):
                await driven.send(STARTED.of(replica_id="r"), _started(number))
            await driven.until(lambda: len(core.events) == 6)
        assert core.events[:6] == [Started(), *(_started(n) for n in range(5))]

    _run(scenario)


def test_publish_and_ask_reach_the_bus() -> None:
    """A core's decisions would stay in its process."""

    async def scenario() -> None:
        route = subjects.ROUTE_REPLY.of(ingress_id="i")

        def react(event: Any) -> list[Effect]:
            if isinstance(event, Started):
                kept = KEPT.send(PlanKept(epoch=1, reason="none better"))
                return [kept, Ask(subjects.ROUTE.pattern, _question(), route.pattern)]
            return []

        bus = MemoryBus()
        got: list[Delivery] = []
        await bus.subscribe("oserve.>", got.append)
        async with Driven(RecordingCore(react), bus) as driven:
            await driven.until(lambda: len(got) == 2)
        assert decode(got[0].payload, PlanKept).reason == "none better"
        assert got[1].reply_to == route.pattern

    _run(scenario)


def test_timers_fire_in_order_and_a_past_one_at_once() -> None:
    """A phase deadline would never come, or come in the wrong order."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            if isinstance(event, Started):
                now_s = SystemClock().now_s()
                delays_s = (0.06, 0.02, -1.0)
                return [SetTimer(now_s + d, Tick(number=round(d * 100))) for d in delays_s]
            return []

        core = RecordingCore(react)
        async with Driven(core) as driven:
            await driven.until(lambda: len(core.of(Tick)) == 3)
        assert [tick.number for tick in core.of(Tick)] == [-100, 2, 6]

    _run(scenario)


def test_query_and_reply() -> None:
    """The router would hear questions but nobody its answers."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            if isinstance(event, Query):
                answer = RouteReply(request_id=_request_id(event), replica_id="r0")
                return [Reply(event.reply_to, answer)]
            return []

        core = RecordingCore(react)
        async with Driven(core, queries=((subjects.ROUTE, "router"),)) as driven:
            payload = await driven.bus.request(
                subjects.ROUTE.pattern, encode(_question(7)), timeout_s=WAIT_S
            )
        assert decode(payload, RouteReply).request_id == "q7"

    _run(scenario)


def test_load_store_and_conflict() -> None:
    """The switcher would not find its plan again, or not learn that another wrote first."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            match event:
                case Started():
                    return [Load("plan", PlanKept)]
                case Loaded(message=None):
                    return [Store("plan", PlanKept(epoch=1, reason="first"), event.revision)]
                case Stored():
                    return [Store("plan", PlanKept(epoch=2, reason="stale"), 0)]
                case StoreConflict():
                    return [Load("plan", PlanKept)]
                case _:
                    return []

        core = RecordingCore(react)
        async with Driven(core) as driven:
            await driven.until(lambda: len(core.of(Loaded)) == 2)
        (stored,) = core.of(Stored)
        empty, found = core.of(Loaded)
        assert (empty.message, empty.revision) == (None, 0)
        assert (found.message, found.revision) == (
            PlanKept(epoch=1, reason="first"),
            stored.revision,
        )
        assert core.of(StoreConflict) == [StoreConflict(key="plan")]

    _run(scenario)


def test_a_store_whose_answer_was_lost_is_no_conflict() -> None:
    """After a broker hiccup the switcher would take its own write for somebody else's."""

    class Hiccup(MemoryBus):
        async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
            written = await super().store(key, value, revision=revision)
            if written is not None:
                raise BusUnavailable("the answer was lost")
            return written

    async def scenario() -> None:
        effect = Store("plan", PlanKept(epoch=1, reason="mine"), 0)
        core = RecordingCore(lambda event: [effect] if isinstance(event, Started) else [])
        async with Driven(core, Hiccup()) as driven:
            await driven.until(lambda: bool(core.of(Stored)))
        assert core.of(StoreConflict) == []

    _run(scenario)


def test_load_waits_until_the_broker_is_back() -> None:
    """A core would start from nothing because the broker was away for a moment."""

    class Away(MemoryBus):
        failures = 1

        async def load(self, key: str) -> tuple[bytes | None, int]:
            if self.failures:
                self.failures -= 1
                raise BusUnavailable("away")
            return await super().load(key)

    async def scenario() -> None:
        bus = Away()
        await bus.store("plan", encode(PlanKept(epoch=3, reason="kept")), revision=0)
        core = RecordingCore(lambda e: [Load("plan", PlanKept)] if isinstance(e, Started) else [])
        async with Driven(core, bus) as driven:
            await driven.until(lambda: bool(core.of(Loaded)))
        assert core.of(Loaded)[0].message.epoch == 3

    _run(scenario)


def test_undecodable_state_is_reported_as_absent(caplog: pytest.LogCaptureFixture) -> None:
    """One bad value in the bucket would keep the service from ever starting again."""

    async def scenario() -> None:
        bus = MemoryBus()
        revision = await bus.store("plan", b"\xc1 not msgpack", revision=0)
        assert revision is not None
        core = RecordingCore(lambda e: [Load("plan", PlanKept)] if isinstance(e, Started) else [])
        async with Driven(core, bus) as driven:
            await driven.until(lambda: bool(core.of(Loaded)))
        assert core.of(Loaded) == [Loaded(key="plan", message=None, revision=revision)]

    _run(scenario)
    assert "state.undecodable" in caplog.messages


def test_jobs_sync_and_async_hand_their_outcome_back() -> None:
    """Slow work would block the core, or its result be lost."""

    async def scenario() -> None:
        released = asyncio.Event()

        async def slow(number: int) -> Message:
            await released.wait()
            return Tick(number=number)

        done: list[int] = []
        jobs: dict[str, Job] = {
            "fast": lambda number: Tick(number=number),
            "silent": done.append,
            "slow": slow,
        }
        starts: list[Effect] = [Start("slow", 1), Start("fast", 2), Start("silent", 3)]
        core = RecordingCore(lambda e: starts if isinstance(e, Started) else [])
        async with Driven(core, jobs=jobs, inputs=(STARTED,)) as driven:
            await driven.until(lambda: core.of(Tick) == [Tick(number=2)])
            await driven.send(STARTED.of(replica_id="r"), _started(1))
            await driven.until(lambda: bool(core.of(ReplicaStarted)))
            assert core.of(Tick) == [Tick(number=2)]
            released.set()
            await driven.until(lambda: core.of(Tick) == [Tick(number=2), Tick(number=1)])
        assert done == [3]

    _run(scenario)


def test_draining_comes_once_and_the_run_waits_for_drained() -> None:
    """A service told to end would cut off what it still serves."""

    async def scenario() -> None:
        core = RecordingCore()
        settled = False
        driven = Driven(core, drained=lambda: settled, inputs=(STARTED,))
        await driven.__aenter__()
        driven.stopping.set()
        await driven.until(lambda: bool(core.of(Draining)))
        await driven.send(STARTED.of(replica_id="r"), _started(1))
        await driven.until(lambda: bool(core.of(ReplicaStarted)))
        await asyncio.sleep(0.1)
        assert not driven.task.done()
        settled = True
        async with asyncio.timeout(WAIT_S):
            await driven.task
        assert core.of(Draining) == [Draining()]

    _run(scenario)


@pytest.mark.parametrize("drain_timeout_s", [0.0, 30.0])
def test_draining_is_told_even_when_stopped_before_it_began(drain_timeout_s: float) -> None:
    """A service stopped while it starts would leave without a word to the mesh."""

    async def scenario() -> None:
        core = RecordingCore()
        driven = Driven(core, drain_timeout_s=drain_timeout_s)
        driven.stopping.set()
        async with asyncio.timeout(WAIT_S):
            await driven.runtime.run(driven.stopping)
        assert core.events == [Started(), Draining()]

    _run(scenario)


def test_what_a_draining_core_says_last_is_sent_and_stored() -> None:
    """A worker's farewell, or the profiler's last state, would be lost."""

    async def scenario() -> None:
        farewell = PlanKept(epoch=9, reason="leaving")
        last: list[Effect] = [KEPT.send(farewell), Store("state", farewell, 0)]
        core = RecordingCore(lambda event: last if isinstance(event, Draining) else [])
        async with Driven(core) as driven:
            pass
        assert decode(driven.bus.sent[-1][1], PlanKept) == farewell
        value, _ = await driven.bus.load("state")
        assert value == encode(farewell)

    _run(scenario)


def test_drain_has_a_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """A core that never settles would keep its process for ever."""

    async def scenario() -> None:
        async with Driven(RecordingCore(), drained=lambda: False, drain_timeout_s=0.1):
            pass

    _run(scenario)
    assert "drain.timeout" in caplog.messages


def test_a_busy_core_still_drains_in_time() -> None:
    """A core that always has something to do would not hear that it should end."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            return [Start("again", None)] if isinstance(event, Started | Tick) else []

        core = RecordingCore(react)
        jobs = {"again": _tick}
        async with Driven(core, jobs=jobs, drain_timeout_s=0.1):
            pass
        assert core.of(Draining) == [Draining()]

    _run(scenario)


def test_a_full_inbox_refuses_questions_and_drops_the_rest() -> None:
    """Under a flood a service would grow without limit, or questions hang unanswered."""

    async def scenario() -> None:
        blocked, release = asyncio.Event(), asyncio.Event()

        class SlowBus(MemoryBus):
            async def publish(self, subject: str, payload: bytes, **more: Any) -> None:
                if subject == KEPT.pattern:
                    blocked.set()
                    await release.wait()
                await super().publish(subject, payload, **more)

        def react(event: Any) -> list[Effect]:
            match event:
                case Started():
                    return [KEPT.send(PlanKept(epoch=0, reason="waits in publish"))]
                case Query():
                    return [Reply(event.reply_to, RouteReply(request_id=_request_id(event)))]
                case _:
                    return []

        def refuse(query: Query) -> Message:
            return RouteReply(request_id=_request_id(query), failure="overloaded")

        core, bus = RecordingCore(react), SlowBus()
        driven = Driven(
            core, bus, inputs=(STARTED,), queries=((subjects.ROUTE, "router"),), inbox_max=4,
            refuse=refuse,
        )  # fmt: skip
        answers: list[RouteReply] = []
        await bus.subscribe("answers", lambda d: answers.append(decode(d.payload, RouteReply)))
        async with driven:
            await blocked.wait()
            for number in range(10):
                await driven.send(STARTED.of(replica_id="r"), _started(number))
                await driven.send(subjects.ROUTE, _question(number), reply_to="answers")
            await driven.until(lambda: len(answers) == 8)
            assert {answer.failure for answer in answers} == {"overloaded"}
            release.set()
            await driven.until(lambda: len(answers) == 10)
            await driven.until(lambda: len(core.of(ReplicaStarted)) == 2)
        assert [answer.request_id for answer in answers if answer.failure is None] == ["q0", "q1"]
        assert driven.count("inbox_dropped", message="ReplicaStarted") == 8
        assert driven.count("inbox_dropped", message="RouteRequest") == 8

    _run(scenario)


def test_of_a_snapshot_only_the_newest_is_kept_and_nothing_else_is_merged() -> None:
    """Behind on reports, a router would work through old ones; merged replies would be lost."""

    async def scenario() -> None:
        core = RecordingCore()
        replies = subjects.ROUTE_REPLY.of(ingress_id="i")
        inputs = (subjects.PLAN_IN_FORCE, replies, STARTED)
        async with Driven(core, inputs=inputs, inbox_max=6) as driven:
            # Published without yielding, so all of it is enqueued in one turn of the loop.
            await driven.send(STARTED.of(replica_id="r"), _started(1))
            for epoch in range(50):
                await driven.send(subjects.PLAN_IN_FORCE, _in_force(epoch))
            for number in range(3):
                await driven.send(replies, RouteReply(request_id=f"q{number}"))
            await driven.until(lambda: len(core.of(RouteReply)) == 3)
        assert core.of(PlanInForce) == [_in_force(49)]
        assert [type(e) for e in core.events[1:3]] == [ReplicaStarted, PlanInForce]
        assert driven.count("inbox_dropped", message="PlanInForce") == 0

    _run(scenario)


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", encode(_in_force(1))])
def test_undecodable_messages_are_counted_and_harmless(payload: bytes) -> None:
    """One malformed message would kill every service that hears it."""

    async def scenario() -> None:
        core = RecordingCore()
        async with Driven(core, inputs=(STARTED,)) as driven:
            await driven.bus.publish(STARTED.of(replica_id="r").pattern, payload)
            await driven.send(STARTED.of(replica_id="r"), _started(2))
            await driven.until(lambda: core.of(ReplicaStarted) == [_started(2)])
        assert driven.count("messages_undecodable", message="ReplicaStarted") == 1

    _run(scenario)


def test_a_core_that_raises_ends_the_run_with_that_error() -> None:
    """A broken invariant would be swallowed, and the service go on with a broken state."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            assert not isinstance(event, ReplicaStopped), "invariant broken"
            return []

        driven = Driven(RecordingCore(react), inputs=(subjects.REPLICA_STOPPED,))
        await driven.__aenter__()
        stopped = ReplicaStopped(epoch=1, worker_id="w", replica_id="r")
        await driven.send(subjects.REPLICA_STOPPED.of(replica_id="r"), stopped)
        with pytest.raises(AssertionError, match="invariant broken"):
            await driven.task

    _run(scenario)


def test_a_job_that_raises_ends_the_run_with_that_error() -> None:
    """Slow work would fail in silence, and the core wait for its outcome for ever."""

    async def scenario() -> None:
        async def fail(_argument: object) -> Message:
            await asyncio.sleep(0)
            raise ValueError("job")

        core = RecordingCore(lambda e: [Start("fail", None)] if isinstance(e, Started) else [])
        driven = Driven(core, jobs={"fail": fail})
        with pytest.raises(ValueError, match="job"):
            await driven.runtime.run(driven.stopping)

    _run(scenario)


def test_check_is_called_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken invariants would be found only by their damage."""
    monkeypatch.setattr("shared.runtime.CHECK_PERIOD_S", 0.01)

    async def scenario() -> None:
        core = RecordingCore()
        async with Driven(core) as driven:
            await driven.until(lambda: core.checks >= 2)

    _run(scenario)


def test_a_failed_publish_is_logged_and_the_core_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """One oversize message, or a broker that is away, would kill the service."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            if isinstance(event, Started):
                return [KEPT.send(PlanKept(epoch=1, reason="x" * 100)), Start("ok", None)]
            return []

        core = RecordingCore(react)
        jobs = {"ok": _tick}
        async with Driven(core, MemoryBus(payload_bytes_max=16), jobs=jobs) as driven:
            await driven.until(lambda: bool(core.of(Tick)))

    _run(scenario)
    (record,) = [r for r in caplog.records if r.message == "publish.failed"]
    assert vars(record)["subject"] == KEPT.pattern


def test_log_effects_may_use_any_field_name(caplog: pytest.LogCaptureFixture) -> None:
    """A core that logs a field called ``name`` would crash its service, but not its tests."""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        effect = Log("replica.seen", {"name": "r0", "message": "hello", "epoch": 3}, "warning")
        core = RecordingCore(lambda event: [effect] if isinstance(event, Started) else [])
        async with Driven(core):
            pass

    _run(scenario)
    (record,) = [r for r in caplog.records if r.getMessage() == "replica.seen"]
    assert record.levelname == "WARNING"
    fields = vars(record)
    assert (fields["name_"], fields["message_"], fields["epoch"]) == ("r0", "hello", 3)


def test_trace_context_goes_through_a_core() -> None:
    """A trace would end at the first core it meets, or one core's work be another's child."""

    async def scenario() -> None:
        def react(event: Any) -> list[Effect]:
            said = KEPT.send(PlanKept(epoch=1, reason="x"))
            return [said] if isinstance(event, ReplicaStarted) else []

        core, bus = RecordingCore(react), MemoryBus()
        out: list[Delivery] = []
        await bus.subscribe(KEPT.pattern, out.append)
        driven = Driven(core, bus, collected.endpoint, inputs=(STARTED,))
        async with driven:
            with driven.tracing.span("caller"):
                headers = driven.tracing.headers()
            assert headers is not None
            subject = STARTED.of(replica_id="r")
            await driven.send(subject, _started(1), headers=headers)
            await driven.until(lambda: len(out) == 1)
            await driven.send(subject, _started(2))
            await driven.until(lambda: len(out) == 2)
        driven.tracing.close()
        caller, inside = collected.named("caller"), collected.named(STARTED.pattern)
        assert inside.trace_id == caller.trace_id
        assert inside.parent_span_id == caller.span_id
        traced, untraced = out
        version, trace_id, span_id, _ = (traced.headers or {})["traceparent"].split("-")
        assert (version, trace_id, span_id) == ("00", inside.trace_id.hex(), inside.span_id.hex())
        assert untraced.headers is None

    with collector() as collected:
        _run(scenario)


def test_without_tracing_no_headers_are_made() -> None:
    """Every message would carry headers that nobody reads."""

    async def scenario() -> None:
        core = RecordingCore(
            lambda e: [KEPT.send(PlanKept(epoch=1, reason="x"))] if isinstance(e, Started) else []
        )
        bus = MemoryBus()
        out: list[Delivery] = []
        await bus.subscribe(KEPT.pattern, out.append)
        async with Driven(core, bus) as driven:
            await driven.until(lambda: len(out) == 1)
        assert out[0].headers is None

    _run(scenario)


def test_effects_are_a_closed_set() -> None:
    """A new effect would be silently ignored by the runtime until its owner notices."""
    import inspect  # only this test reads source
    from typing import get_args

    source = inspect.getsource(Runtime)
    missing = [
        effect.__name__ for effect in get_args(Effect) if f"{effect.__name__}(" not in source
    ]
    assert missing == [], f"shared/runtime.py does not perform {missing}"
    assert Publish in get_args(Effect)
