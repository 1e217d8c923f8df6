"""The engine host: engines that block, break, hang, or are given up while they start."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from services.worker import follower_host
from services.worker.config import WorkerConfig
from services.worker.engine.factory import Building, EngineFactory
from services.worker.engine.interface import Engine, StepResult
from services.worker.engine.modelled import ModelledEngine
from services.worker.engine_host import EngineHost
from services.worker.events import (
    Admission,
    EngineBroken,
    EnginePaused,
    EngineReady,
    EngineStart,
    EngineStopped,
    RequestRefused,
    RequestsEnded,
)
from services.worker.follower_host import FollowerHost
from services.worker.host_context import HostContext
from services.worker.outbox import Outbox
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.errors import EngineFailed
from shared.mesh import ModelledEngineSettings
from shared.messages.base import Message, decode
from shared.messages.replicas import Shares
from shared.messages.requests import TokenChunk, TokenChunks
from shared.placement.copies import Copy
from shared.telemetry import Metrics
from tests.worker_driver import spec, submit

SETTINGS = ModelledEngineSettings(base_s=0.0, start_s=0.0, running_max=2, waiting_max=2)
NAP_S = 0.02


class SlowEngine(ModelledEngine):
    """Blocks like a GPU: each step waits for ``may_step``, and raises ``fault`` if there is one."""

    blocking = True  # pyright: ignore[reportAssignmentType]  # a class constant in the base

    def __init__(self) -> None:
        super().__init__(SETTINGS, context_tokens_max=4096)
        self.may_step = threading.Event()
        self.fault: Exception | None = None
        self.closed = False

    def step(self) -> StepResult:
        self.may_step.wait(5)
        if self.fault is not None:
            raise self.fault
        return StepResult(super().step().chunks)

    def close(self) -> None:
        super().close()
        self.closed = True


@dataclass
class Bench:
    """An engine host with its engine, and what came out of it."""

    engine: SlowEngine
    host: EngineHost
    task: asyncio.Task[None]
    bus: MemoryBus
    events: list[Message] = field(default_factory=list[Message])

    def chunks(self) -> list[TokenChunk]:
        sent = [decode(payload, TokenChunks) for _, payload in self.bus.sent]
        return [chunk for message in sent for chunk in message.chunks]

    def admit(self, request_id: str, *, tokens: int = 3) -> RequestRefused | None:
        return self.host.admit(Admission(f"{request_id}/0", submit(request_id, tokens=tokens)))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # conditions are about what came out
                await asyncio.sleep(0.001)

    async def heard(self, kind: type[Message]) -> Message:
        await self.until(lambda: any(isinstance(event, kind) for event in self.events))
        return next(event for event in self.events if isinstance(event, kind))


@asynccontextmanager
async def bench(
    build: Callable[[SlowEngine], Engine] | None = None,
) -> AsyncGenerator[Bench]:
    engine = SlowEngine()
    factory = EngineFactory(
        build=lambda _start, _building: build(engine) if build else engine,
        running_max=2,
        waiting_max=2,
    )
    bus, events = MemoryBus(), list[Message]()
    async with asyncio.TaskGroup() as tasks:
        context = HostContext(
            config=WorkerConfig(worker_id="n0-g0"),
            factory=factory,
            outbox=Outbox(bus, incarnation="run", delay_s=0.001, metrics=Metrics("worker")),
            clock=SystemClock(),
            feed=events.append,
            tasks=tasks,
        )
        host = EngineHost(EngineStart(spec(), 1), context)
        task = tasks.create_task(host.run())
        yield Bench(engine, host, task, bus, events)
        engine.may_step.set()
        host.stop()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_loop_stays_live_while_the_engine_blocks() -> None:
    """Otherwise one long step would stop heartbeats, and the ingress would give up on it."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.admit("a")
            await asyncio.sleep(NAP_S)  # returns although the step does not
            assert not b.chunks()
            b.engine.may_step.set()
            await b.heard(RequestsEnded)
            assert [chunk.position for chunk in b.chunks()] == [0, 1, 2]

    run(scenario)


def test_abort_during_a_step_silences_and_frees() -> None:
    """Otherwise chunks would follow an abort, and the request would be computed to its end."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.admit("a", tokens=1000)
            await asyncio.sleep(NAP_S)
            b.host.abort("a/0")
            b.engine.may_step.set()
            await b.until(lambda: not b.engine.has_work)
            assert not b.chunks()

    run(scenario)


def test_requests_that_come_during_a_step_join_the_next_or_are_refused() -> None:
    """Otherwise they would race with the step, or be lost."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.admit("q0")
            await asyncio.sleep(NAP_S)
            for n in range(1, 6):
                assert b.admit(f"q{n}") is None
            b.engine.may_step.set()
            await b.until(lambda: sum(isinstance(e, RequestRefused) for e in b.events) == 2)
            await b.until(lambda: sum(c.finish == "length" for c in b.chunks()) == 4)

    run(scenario)


def test_engine_that_raises_is_closed_and_reported_with_its_cause() -> None:
    """Otherwise an operator would not learn that the GPU ran out of memory."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.engine.fault = MemoryError("3 GiB wanted")
            b.engine.may_step.set()
            b.admit("a")
            broken = await b.heard(EngineBroken)
            assert isinstance(broken, EngineBroken)
            assert broken.detail == "MemoryError: 3 GiB wanted"
            assert b.engine.closed

    run(scenario)


def test_engine_that_cannot_load_is_reported() -> None:
    """Otherwise a bad checkpoint would look like a slow start."""

    def refuse(_: SlowEngine) -> Engine:
        raise OSError("no such folder")

    async def scenario() -> None:
        async with bench(refuse) as b:
            broken = await b.heard(EngineBroken)
            assert isinstance(broken, EngineBroken)
            assert broken.detail == "OSError: no such folder"

    run(scenario)


def test_stuck_step_shows_as_stalled() -> None:
    """Otherwise a hung device would keep sending heartbeats."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            assert not b.host.measured(stall_s=0.0).stalled
            b.admit("a")
            await asyncio.sleep(NAP_S)
            assert b.host.measured(stall_s=0.001).stalled
            assert not b.host.measured(stall_s=60.0).stalled
            b.engine.may_step.set()
            await b.heard(RequestsEnded)
            assert not b.host.measured(stall_s=0.001).stalled

    run(scenario)


def test_start_given_up_frees_the_engine() -> None:
    """Otherwise a replica stopped while it loads would stay in memory."""
    loading = threading.Event()

    def load(engine: SlowEngine) -> Engine:
        loading.wait(5)
        return engine

    async def scenario() -> None:
        async with bench(load) as b:
            b.host.stop()
            await asyncio.sleep(NAP_S)
            loading.set()
            await b.heard(EngineStopped)
            assert b.engine.closed
            assert not any(isinstance(event, EngineReady) for event in b.events)

    run(scenario)


def test_hung_engine_does_not_hold_up_the_end() -> None:
    """Otherwise a worker with a hung device could not be restarted."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.admit("a")
            await asyncio.sleep(NAP_S)
            async with asyncio.timeout(2):
                b.task.cancel()
                await asyncio.wait([b.task])
            assert b.task.cancelled()

    run(scenario)


def test_broken_invariant_of_an_engine_is_not_taken_for_a_failure() -> None:
    """Otherwise a worker would go on with an engine that has proved to be wrong."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.engine.fault = AssertionError("KV blocks leaked")
            b.engine.may_step.set()
            b.admit("a")
            await asyncio.wait([b.task])

    with pytest.raises(ExceptionGroup) as raised:
        run(scenario)
    assert raised.group_contains(AssertionError, match="leaked")


def test_a_blocking_engine_stands_still_at_a_step_boundary() -> None:
    """Otherwise its requests would change while another worker copies them."""

    async def scenario() -> None:
        async with bench() as b:
            await b.heard(EngineReady)
            b.admit("a", tokens=1000)
            b.engine.may_step.set()
            await b.until(b.chunks)
            b.host.pause(Shares(rows={"*": {"r2": 1.0}}, leaders={"r2": "n0-g1"}))
            paused = await b.heard(EnginePaused)
            assert isinstance(paused, EnginePaused)
            assert paused.moving == {"a": "n0-g1"}
            count = len(b.chunks())
            b.admit("late", tokens=1)
            b.host.abort("a/0")
            await b.until(lambda: not b.engine.states())
            assert len(b.chunks()) == count
            b.host.resume()
            await b.heard(RequestsEnded)
            assert [chunk.request_id for chunk in b.chunks()[count:]] == ["late"]

    run(scenario)


class Rank:
    """A follower whose leader says goodbye, or is lost, when the test lets it."""

    cache_bytes = cache_bytes_full = 7
    fetch_s = 0.5

    def __init__(self) -> None:
        self.fetched = {"n0-g1": 3}
        self.over = threading.Event()
        self.fault: Exception | None = None
        self.closed = False

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """Nothing: no cache."""

    def serve(self) -> None:
        self.over.wait(5)
        if self.fault is not None:
            raise self.fault

    def stop(self) -> None:
        self.over.set()

    def close(self) -> None:
        self.closed = True


async def follow(rank: Rank, then: Callable[[FollowerHost], None]) -> list[Message]:
    """Run a rank; ``then`` once it is ready. What its host said."""
    events: list[Message] = []
    async with asyncio.TaskGroup() as tasks:
        context = HostContext(
            config=WorkerConfig(worker_id="n0-g0"),
            factory=EngineFactory(
                build=lambda _start, _building: SlowEngine(),
                follow=lambda _start, _building: rank,
                running_max=2,
                waiting_max=2,
            ),
            outbox=Outbox(MemoryBus(), incarnation="run", delay_s=0.001, metrics=Metrics("worker")),
            clock=SystemClock(),
            feed=events.append,
            tasks=tasks,
        )
        host = FollowerHost(EngineStart(spec(), 1, rank=1), context)
        task = tasks.create_task(host.run())
        async with asyncio.timeout(5):
            while not events:
                await asyncio.sleep(0.001)
            then(host)
            await task
    assert rank.closed
    return events


def test_a_rank_takes_part_until_it_is_stopped() -> None:
    """Otherwise a GPU would stay taken, or its memory be told of before it is there."""
    ready, stopped = asyncio.run(follow(Rank(), FollowerHost.stop))
    assert isinstance(ready, EngineReady)
    assert (ready.bytes_by_source, ready.cache_bytes) == ({"n0-g1": 3}, 7)
    assert ready.took_s == 0.5, "what else the start took is not copying"
    assert isinstance(stopped, EngineStopped)


def test_a_rank_whose_leader_is_lost_is_broken() -> None:
    """Otherwise it would seem to serve, and nobody would start it again."""
    rank = Rank()
    rank.fault = EngineFailed("the leader is silent")
    _, broken = asyncio.run(follow(rank, lambda _: rank.over.set()))
    assert isinstance(broken, EngineBroken)
    assert broken.detail == "EngineFailed: the leader is silent"


def test_a_rank_whose_leader_has_closed_the_replica_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it would wait for ever for a leader that starts without it."""
    monkeypatch.setattr(follower_host, "FAREWELL_S", 0.01)
    rank = Rank()
    _, broken = asyncio.run(follow(rank, lambda _: rank.over.set()))
    assert isinstance(broken, EngineBroken)
    assert "closed the replica" in broken.detail


@pytest.mark.parametrize("kind", [EngineHost, FollowerHost])
def test_what_is_fetched_shows_while_it_comes(kind: type[EngineHost | FollowerHost]) -> None:
    """A switch's progress bar would stand at nothing until all is there."""
    half, on = threading.Event(), threading.Event()

    def fetch(_start: EngineStart, building: Building) -> NoReturn:
        building.fetched["n0-g1"] = 5
        building.fetched["n0-g0"] = 7  # its own
        half.set()
        on.wait(20)
        raise EngineFailed("enough")

    async def look() -> int:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            context = HostContext(
                config=WorkerConfig(worker_id="n0-g0"),
                factory=EngineFactory(build=fetch, follow=fetch, running_max=2, waiting_max=2),
                outbox=Outbox(MemoryBus(), incarnation="r", delay_s=0.1, metrics=Metrics("worker")),
                clock=SystemClock(),
                feed=lambda _: None,
                tasks=tasks,
            )
            host = kind(EngineStart(spec(), 1), context)
            tasks.create_task(host.run())
            await asyncio.to_thread(half.wait, 20)
            told = host.measured() if isinstance(host, FollowerHost) else host.measured(stall_s=9.0)
            on.set()
        return told.fetched_bytes

    assert asyncio.run(look()) == 5


@pytest.mark.parametrize("kind", [EngineHost, FollowerHost])
def test_a_start_that_waits_for_other_ranks_ends_when_it_is_stopped(
    kind: type[EngineHost | FollowerHost],
) -> None:
    """Otherwise a switch that is rolled back would wait for a rank that never comes."""
    waiting = threading.Event()

    def wait_for_others(_start: EngineStart, building: Building) -> NoReturn:
        while True:
            waiting.set()
            building.go_on()
            time.sleep(0.001)

    async def stop_it() -> list[Message]:
        events: list[Message] = []
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            context = HostContext(
                config=WorkerConfig(worker_id="n0-g0"),
                factory=EngineFactory(
                    build=wait_for_others, follow=wait_for_others, running_max=2, waiting_max=2
                ),
                outbox=Outbox(MemoryBus(), incarnation="r", delay_s=0.1, metrics=Metrics("worker")),
                clock=SystemClock(),
                feed=events.append,
                tasks=tasks,
            )
            host = kind(EngineStart(spec(), 1), context)
            task = tasks.create_task(host.run())
            await asyncio.to_thread(waiting.wait, 20)
            host.stop()
            await task
        return events

    (stopped,) = asyncio.run(stop_it())
    assert isinstance(stopped, EngineStopped)
