"""Requests on their way from one leader to another: who gets what, in which frames, how long."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from services.worker import states as states_module
from services.worker.attempts import Attempt
from services.worker.between import Between
from services.worker.config import WorkerConfig
from services.worker.engine.factory import EngineFactory
from services.worker.engine.interface import Engine, EngineRequest, LiveState, Taken
from services.worker.engine.modelled import ModelledEngine
from services.worker.events import EngineRelease, EngineReleased, EngineTake, EngineTook
from services.worker.handover import Handover
from services.worker.host_context import HostContext
from services.worker.outbox import Outbox
from services.worker.peers.link import PeerLink
from services.worker.peers.server import PeerServer
from services.worker.states import (
    StatesWanted,
    ask_leader,
    ask_states,
    send_states,
    topic_of,
    wanted_of,
)
from services.worker.takeover import Takeover
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.errors import PeerLost
from shared.mesh import ModelledEngineSettings
from shared.messages.base import Message
from shared.messages.replicas import Shares
from shared.messages.requests import RequestState, RequestStates, SamplingParams
from shared.telemetry import Metrics

ROWS = {"*": {"x": 1.0, "y": 1.0}}
ALL = StatesWanted("x", {"*": {"x": 1.0}}, whole=True)
WAIT_S = 20.0


def live(number: int, *, tokens: int = 5) -> tuple[Attempt, LiveState]:
    attempt = Attempt(
        request_id=f"q{number}",
        attempt=0,
        ingress_id="i0",
        slo_class="standard",
        request_type=-1,
        subject="",
    )
    request = EngineRequest(
        key=attempt.key,
        prompt_tokens=[70_000 + number] * tokens,
        sampling=SamplingParams(output_tokens_max=9),
    )
    state = LiveState(
        request=request, output_tokens=[1, 2, number], computed=4, blocks=[number], admission=3
    )
    return attempt, state


class Old:
    """An engine that gives its requests away."""

    block_tokens = 16

    def __init__(self, count: int) -> None:
        self.requests = [live(number) for number in range(count)]

    def states(self) -> list[LiveState]:
        return [state for _, state in self.requests]


@pytest.fixture
def server() -> Iterator[PeerServer]:
    server = PeerServer(worker_id="w0")
    yield server
    server.close()


@asynccontextmanager
async def stepped(between: Between, engine: object, woken: asyncio.Event) -> AsyncGenerator[None]:
    """Between two steps all the time."""

    async def performer(call: Callable[[], Any]) -> Any:
        return call()

    async def run() -> None:
        while True:
            await woken.wait()
            woken.clear()
            await between.perform(cast("Engine", engine), performer)

    task = asyncio.create_task(run())
    yield
    task.cancel()


@asynccontextmanager
async def old_leader(server: PeerServer, engine: Old) -> AsyncGenerator[Handover]:
    woken = asyncio.Event()
    between = Between(woken.set)
    known = {attempt.key: attempt for attempt, _ in engine.requests}
    handover = Handover("r1", between, known, SystemClock())
    handover.offer(server)
    async with stepped(between, engine, woken):
        yield handover


def test_each_taker_gets_its_own_requests_alone(server: PeerServer) -> None:
    """Every taker would read the prompts of all requests, ten times a second."""
    engine = Old(40)

    async def main() -> None:
        async with old_leader(server, engine) as handover:
            handover.pause(Shares(rows=ROWS))
            handover.stand_still([])
            seen: list[str] = []
            for taker in ("x", "y"):
                wanted = StatesWanted(taker, ROWS, whole=True)
                answer = await ask_leader("r1", server.address, wanted)
                ours = [a for a, _ in engine.requests if a.target(ROWS) == taker]
                assert list(answer.attempts) == [attempt.key for attempt in ours]
                assert 0 < len(ours) < 40
                by_key = {state.request.key: state for state in engine.states()}
                for state in answer.states:
                    mine = by_key[state.request.key]
                    assert state.output_tokens == mine.output_tokens
                    assert state.request.prompt_tokens == mine.request.prompt_tokens
                    assert (state.computed, state.blocks, state.admission) == (4, mine.blocks, 3)
                seen += answer.attempts
            assert len(seen) == 40

    asyncio.run(main())


def test_ahead_of_the_pause_tokens_stay_where_they_are(server: PeerServer) -> None:
    """Copying ahead would cost the old replica more than the steps that it makes meanwhile."""
    engine = Old(3)

    async def main() -> None:
        async with old_leader(server, engine):
            slim = StatesWanted("x", {}, whole=False)
            wanted = StatesWanted("x", {"*": {"x": 1.0}}, whole=False)
            assert not (await ask_leader("r1", server.address, slim)).states  # nothing falls to it
            answer = await ask_leader("r1", server.address, wanted)
            for (_, state), slim_state in zip(engine.requests, answer.states, strict=True):
                assert slim_state.request.prompt_tokens == [0] * 5
                assert slim_state.output_tokens == [0] * 3
                assert slim_state.request.sampling == state.request.sampling
                assert (slim_state.computed, slim_state.blocks) == (4, state.blocks)
            assert answer.head.block_tokens == 16
            # Asked for all while it runs, it says no more than that.
            running = await ask_leader("r1", server.address, ALL)
            assert (running.head.paused, running.states) == (False, [])

    asyncio.run(main())


def wire(number: int, tokens: int) -> RequestState:
    attempt, state = live(number, tokens=tokens)
    return attempt.leaves_as(state, whole=True)


def offer(server: PeerServer, states: Sequence[RequestState], *, block_tokens: int = 16) -> None:
    head = RequestStates(replica_id="r1", block_tokens=block_tokens, paused=True, paused_for_s=0.5)

    def answer(link: PeerLink, hello: bytes) -> None:
        assert wanted_of(hello).taker
        send_states(link, head, states)

    server.offer(topic_of("r1"), answer)


def test_no_number_of_requests_is_too_large(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound of a message no live switch would ever succeed."""
    monkeypatch.setattr(states_module, "FRAME_TOKENS", 200)
    monkeypatch.setattr("services.worker.peers.link.MESSAGE_BYTES_MAX", 2000)
    states = [wire(number, tokens=10 * (number % 20)) for number in range(200)]
    offer(server, states)
    _, found = ask_states(server.address, topic_of("r1"), ALL, timeout_s=WAIT_S)
    assert found == states


def test_an_answer_without_end_is_refused(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer gone wrong would take all memory."""
    monkeypatch.setattr(states_module, "FRAME_TOKENS", 200)
    monkeypatch.setattr(states_module, "STATES_BYTES_MAX", 3000)
    offer(server, [wire(number, tokens=50) for number in range(50)])
    with pytest.raises(PeerLost, match="more than 3000 bytes"):
        ask_states(server.address, topic_of("r1"), ALL, timeout_s=WAIT_S)


def test_other_words_are_a_lost_peer(server: PeerServer) -> None:
    """Workers of two releases would break each other's engines."""
    server.offer(topic_of("r1"), lambda link, _: link.send(b"\xc1"))
    with pytest.raises(PeerLost, match="other words"):
        ask_states(server.address, topic_of("r1"), ALL, timeout_s=WAIT_S)
    with pytest.raises(PeerLost, match="other words"):
        wanted_of(b"\x00")


class New(ModelledEngine):
    """An engine that takes over, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(ModelledEngineSettings(start_s=0.0), context_tokens_max=4096)
        self.given: list[LiveState] = []

    def take(self, replica_id: str, states: Sequence[LiveState], *, final: bool) -> Taken:
        self.given += states
        return super().take(replica_id, states, final=final)


class Taker:
    """A takeover with its engine, between two steps all the time."""

    def __init__(self, tasks: asyncio.TaskGroup, engine: New) -> None:
        self.events: list[Message] = []
        self.live: dict[str, Attempt] = {}
        self.woken = asyncio.Event()
        self.between = Between(self.woken.set)
        context = HostContext(
            config=WorkerConfig(worker_id="w1"),
            factory=EngineFactory(build=lambda _start, _: engine, running_max=8, waiting_max=8),
            outbox=Outbox(MemoryBus(), incarnation="", delay_s=0.1, metrics=Metrics("worker")),
            clock=SystemClock(),
            feed=self.events.append,
            tasks=tasks,
        )
        self.takeover = Takeover("x", 1, self.between, context, self.live)

    async def took(self, sources: dict[str, str], peers: dict[str, str]) -> EngineTook:
        self.takeover.take(EngineTake("x", 1, 2, sources, peers, Shares(rows=ALL.rows)))
        event = await self.heard(EngineTook)
        assert isinstance(event, EngineTook)
        return event

    async def heard(self, kind: type[Message]) -> Message:
        async with asyncio.timeout(WAIT_S):
            while not (found := [event for event in self.events if isinstance(event, kind)]):
                await asyncio.sleep(0.001)
        return found[0]


def takes(engine: New, scenario: Callable[[Taker], Any]) -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            taker = Taker(tasks, engine)
            async with stepped(taker.between, engine, taker.woken):
                await scenario(taker)
            taker.takeover.close()

    asyncio.run(main())


def test_blocks_of_another_size_are_not_copied(server: PeerServer) -> None:
    """Tokens would read the keys and values of others: wrong text, and nobody would notice."""
    engine = New()
    offer(server, [wire(0, 20), wire(1, 20)], block_tokens=engine.block_tokens * 2)

    async def scenario(taker: Taker) -> None:
        took = await taker.took({"r1": "w0"}, {"w0": server.address})
        assert (took.moved, took.replayed, took.failure) == (0, 2, "")
        assert "give both the same block_tokens" in took.detail
        assert [(state.computed, state.blocks) for state in engine.given] == [(0, []), (0, [])]
        assert engine.given[0].request.prompt_tokens == [70_000] * 20

    takes(engine, scenario)


def test_a_frozen_source_keeps_nobody_waiting(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker that hangs would prolong everybody's pause until the switch is undone."""
    monkeypatch.setattr(states_module, "ASK_S_MAX", 0.1)
    engine, frozen = New(), PeerServer(worker_id="w9")
    thawed = asyncio.Event()
    offer(server, [wire(0, 20)], block_tokens=engine.block_tokens)

    def hang(link: PeerLink, hello: bytes) -> None:
        del hello
        with pytest.raises(PeerLost):
            link.recv(WAIT_S)  # until the caller has gone
        thawed.set()

    frozen.offer(topic_of("r9"), hang)

    async def scenario(taker: Taker) -> None:
        peers = {"w0": server.address, "w9": frozen.address}
        took = await taker.took({"r9": "w9", "r1": "w0"}, peers)
        assert (took.moved, took.replayed, took.failure) == (1, 0, "")
        assert took.detail == "nothing from r9: worker w9 is silent"

    takes(engine, scenario)
    frozen.close()
    assert thawed.is_set()


def test_a_pause_ends_with_a_step_of_the_new_replica(server: PeerServer) -> None:
    """What clients wait for is a token: a switch would look shorter than it felt."""
    engine = New()
    began_s = time.monotonic()
    offer(server, [wire(0, 20)], block_tokens=engine.block_tokens)

    async def scenario(taker: Taker) -> None:
        await taker.took({"r1": "w0"}, {"w0": server.address})
        taker.takeover.release(EngineRelease("x", 1, 2, keep=True))
        await taker.between.do(lambda engine: engine.load())  # and so the release is done, too
        assert not [event for event in taker.events if isinstance(event, EngineReleased)]
        taker.takeover.stepped()
        taker.takeover.stepped()
        [released] = [event for event in taker.events if isinstance(event, EngineReleased)]
        [(pause_s, count)] = released.pauses
        assert count == 1
        assert 0.5 <= pause_s <= 0.5 + time.monotonic() - began_s

    takes(engine, scenario)
