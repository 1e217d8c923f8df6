"""Two workers as services: requests move between them while their streams go on."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from services.worker.config import WorkerConfig
from services.worker.peers.server import PeerServer
from services.worker.service import serve
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.hardware import Parallelism
from shared.ids import CountedIds
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.messages.base import DataMessage, Message, decode, encode
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    GrowCache,
    PauseReplica,
    PrepareReplica,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPrepared,
    ReplicaStarted,
    ReplicaStopped,
    RequestsTaken,
    ResumeReplica,
    Shares,
    StartReplica,
    StopReplica,
    TakeRequests,
    WorkerReport,
)
from shared.messages.requests import (
    AbortRequest,
    SamplingParams,
    SubmitRequest,
    TokenChunk,
    TokenChunks,
)
from shared.models import ModelSpec
from shared.placement.copies import Copy
from shared.placement.sheets import Rank, areas_of, cache_token_bytes
from shared.service import ServiceContext
from shared.subjects import (
    ABORT_REQUEST,
    GROW_CACHE,
    PAUSE_REPLICA,
    PREPARE_REPLICA,
    REPLICA_FAILED,
    REPLICA_PAUSED,
    REPLICA_PREPARED,
    REPLICA_STARTED,
    REPLICA_STOPPED,
    REQUESTS_TAKEN,
    RESUME_REPLICA,
    START_REPLICA,
    STOP_REPLICA,
    SUBMIT_REQUEST,
    TAKE_REQUESTS,
    TOKEN_CHUNKS,
    WORKER_REPORT,
    Subject,
)
from shared.telemetry import Metrics, TelemetryConfig, Tracing

OLD, NEW = "n0-g0", "n0-g1"
ENGINE = ModelledEngineSettings(base_s=0.004, start_s=0.0)
SHARES = Shares(rows={"*": {"r2": 1.0}}, leaders={"r2": NEW})
T = TypeVar("T", bound=Message | DataMessage)
M = TypeVar("M", bound=Message)

MESH = MeshConfig(
    model=ModelSpec(model_id="tiny"),
    engine=EngineSpec(kind="modelled", modelled=ENGINE),
    nodes=(NodeSpec(node_id="n0", gpus=2),),
)


def spec(replica_id: str, worker_id: str) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id, model_id="tiny", parallelism="tp1pp1", gpus=(worker_id,)
    )


@dataclass
class Pair:
    """Switcher and ingress of two workers."""

    bus: MemoryBus
    stopping: asyncio.Event
    heard: list[Message | DataMessage] = field(default_factory=list[Message | DataMessage])

    async def listen(self, subject: Subject[Any]) -> None:
        def on_delivery(delivery: Delivery) -> None:
            self.heard.append(decode(delivery.payload, subject.message))

        await self.bus.subscribe(subject.wildcard, on_delivery)

    async def tell(self, subject: Subject[M], message: M, worker_id: str) -> None:
        publish = subject.send(message, worker_id=worker_id)
        await self.bus.publish(publish.subject, encode(publish.message))

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.heard if isinstance(message, kind)]

    def tokens(self, request_id: str) -> list[int]:
        """All in order; positions without a gap or a repeat."""
        chunks = [c for m in self.of(TokenChunks) for c in m.chunks if c.request_id == request_id]
        tokens: list[int] = []
        for chunk in chunks:
            assert not chunk.tokens or chunk.position == len(tokens), chunk
            tokens += chunk.tokens
        return tokens

    def last(self, request_id: str) -> TokenChunk | None:
        chunks = [c for m in self.of(TokenChunks) for c in m.chunks if c.request_id == request_id]
        return next((chunk for chunk in chunks if chunk.finish is not None), None)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # conditions are about what was heard
                await asyncio.sleep(0.002)

    async def submit(self, request_id: str, *, tokens: int, worker_id: str = OLD) -> None:
        request = SubmitRequest(
            request_id=request_id,
            attempt=0,
            ingress_id="i0",
            epoch=1,
            replica_id="r1" if worker_id == OLD else "r2",
            prompt_tokens=list(b"Tell me a story."),
            sampling=SamplingParams(output_tokens_max=tokens),
        )
        await self.tell(SUBMIT_REQUEST, request, worker_id)

    async def start(self, replica_id: str, worker_id: str, epoch: int) -> None:
        self.forget(ReplicaStarted)
        command = StartReplica(
            epoch=epoch, worker_id=worker_id, replica=spec(replica_id, worker_id)
        )
        await self.tell(START_REPLICA, command, worker_id)
        await self.until(lambda: self.of(ReplicaStarted))

    def forget(self, kind: type[Message]) -> None:
        self.heard = [message for message in self.heard if not isinstance(message, kind)]

    def peers(self) -> dict[str, str]:
        return {report.worker_id: report.peer for report in self.of(WorkerReport)}

    def cached(self) -> int:
        """Tokens in the KV cache of the new worker."""
        report = [report for report in self.of(WorkerReport) if report.worker_id == NEW][-1]
        return sum(replica.cache_tokens for replica in report.replicas)

    async def prepare(self, epoch: int = 2) -> None:
        command = PrepareReplica(
            epoch=epoch,
            worker_id=NEW,
            replica=spec("r2", NEW),
            peers=self.peers(),
            sources={"r1": OLD},
            shares=SHARES,
        )
        await self.tell(PREPARE_REPLICA, command, NEW)
        await self.until(lambda: self.of(ReplicaPrepared))

    async def pause(self, epoch: int = 2) -> None:
        command = PauseReplica(epoch=epoch, worker_id=OLD, replica_id="r1", shares=SHARES)
        await self.tell(PAUSE_REPLICA, command, OLD)
        await self.until(lambda: self.of(ReplicaPaused))

    async def take(
        self,
        epoch: int = 2,
        *,
        peers: dict[str, str] | None = None,
        sources: dict[str, str] | None = None,
    ) -> None:
        command = TakeRequests(
            epoch=epoch,
            worker_id=NEW,
            replica_id="r2",
            sources={"r1": OLD} if sources is None else sources,
            peers=self.peers() if peers is None else peers,
            shares=SHARES,
        )
        await self.tell(TAKE_REQUESTS, command, NEW)
        await self.until(lambda: self.of(RequestsTaken) or self.of(ReplicaFailed))

    async def stop(self, epoch: int = 2) -> None:
        await self.tell(STOP_REPLICA, StopReplica(epoch=epoch, worker_id=OLD, replica_id="r1"), OLD)
        await self.until(lambda: self.of(ReplicaStopped))


@asynccontextmanager
async def pair(topology: MeshConfig) -> AsyncGenerator[Pair]:
    bus, stopping = MemoryBus(), asyncio.Event()
    mesh = Pair(bus, stopping)
    for subject in (REPLICA_STARTED, REPLICA_STOPPED, REPLICA_PREPARED, REPLICA_PAUSED):
        await mesh.listen(subject)
    for subject in (REQUESTS_TAKEN, REPLICA_FAILED, WORKER_REPORT, TOKEN_CHUNKS):
        await mesh.listen(subject)
    ids = CountedIds()
    async with asyncio.TaskGroup() as tasks:
        for worker_id in (OLD, NEW):
            context = ServiceContext(
                name="worker",
                instance_id=worker_id,
                bus=bus,
                clock=SystemClock(),
                ids=ids,
                mesh=topology,
                metrics=Metrics("worker"),
                tracing=Tracing(TelemetryConfig(), service="worker", instance_id=worker_id),
                stopping=stopping,
            )
            config = WorkerConfig(
                worker_id=worker_id,
                report_s=0.02,
                worker_report_s=0.05,
                pause_patience_s=0.2,
                take_timeout_s=1.0,
            )
            tasks.create_task(serve(config, context))
        await mesh.until(lambda: len(mesh.peers()) == 2)
        await mesh.start("r1", OLD, 1)
        yield mesh
        stopping.set()


def run(scenario: Callable[[Pair], Awaitable[None]], topology: MeshConfig = MESH) -> None:
    async def main() -> None:
        async with pair(topology) as mesh:
            await scenario(mesh)

    asyncio.run(main())


def test_streams_go_on_at_another_worker_as_if_nothing_had_happened() -> None:
    """Otherwise a switch would break streams, repeat tokens or lose them."""

    async def scenario(mesh: Pair) -> None:
        names = [f"q{n}" for n in range(8)]
        for name in names:
            await mesh.submit(name, tokens=150)
        await mesh.prepare()
        await mesh.until(lambda: all(len(mesh.tokens(name)) > 5 for name in names))
        await mesh.pause()
        await mesh.take()
        [taken] = mesh.of(RequestsTaken)
        assert (taken.moved + taken.replayed, taken.detail) == (8, "")
        made = {name: len(mesh.tokens(name)) for name in names}
        await mesh.start("r2", NEW, 2)
        [started] = mesh.of(ReplicaStarted)
        assert sum(count for _, count in started.pauses) == taken.moved > 0
        assert all(seconds > 0 for seconds, _ in started.pauses)
        await mesh.stop()
        await mesh.until(lambda: all(mesh.last(name) for name in names))
        assert all(0 < made[name] < 150 for name in names)
        signed = [m for m in mesh.of(TokenChunks) if m.worker_id == NEW and m.chunks]
        assert {c.request_id for m in signed for c in m.chunks} >= set(names)
        await mesh.submit("undisturbed", tokens=150, worker_id=NEW)
        await mesh.until(lambda: mesh.last("undisturbed"))
        for name in names:
            assert mesh.tokens(name) == mesh.tokens("undisturbed")
            last = mesh.last(name)
            assert last is not None
            assert last.finish == "length"

    run(scenario)


def test_what_comes_during_the_pause_is_kept_and_handed_back() -> None:
    """Otherwise requests that arrive in those moments would be refused, or lost."""

    async def scenario(mesh: Pair) -> None:
        await mesh.submit("early", tokens=400)
        await mesh.prepare()
        await mesh.pause()
        await mesh.submit("late", tokens=5)
        await mesh.until(
            lambda: any(c.request_id == "late" for m in mesh.of(TokenChunks) for c in m.chunks)
        )
        await mesh.take()
        await mesh.start("r2", NEW, 2)
        await mesh.stop()
        await mesh.until(lambda: mesh.last("late"))
        late = mesh.last("late")
        assert late is not None
        assert (late.finish, late.failure, mesh.tokens("late")) == ("failed", "draining", [])
        assert mesh.last("early") is None

    run(scenario)


def test_a_switch_that_is_rolled_back_loses_nothing() -> None:
    """Otherwise a switch that fails would cost the requests that it meant to spare."""

    async def scenario(mesh: Pair) -> None:
        await mesh.submit("a", tokens=120)
        await mesh.prepare()
        await mesh.pause()
        await mesh.submit("b", tokens=20)
        await mesh.take()
        mesh.forget(ReplicaStarted)
        await mesh.tell(RESUME_REPLICA, ResumeReplica(epoch=3, worker_id=OLD, replica_id="r1"), OLD)
        await mesh.until(lambda: mesh.of(ReplicaStarted))
        await mesh.tell(STOP_REPLICA, StopReplica(epoch=3, worker_id=NEW, replica_id="r2"), NEW)
        await mesh.until(lambda: mesh.last("a") and mesh.last("b"))
        assert (len(mesh.tokens("a")), len(mesh.tokens("b"))) == (120, 20)
        await mesh.until(lambda: mesh.of(ReplicaStopped))

    run(scenario)


def test_an_abort_follows_its_request() -> None:
    """Otherwise a client that hangs up in those moments would be served to the end."""

    async def scenario(mesh: Pair) -> None:
        for name in ("a", "b", "c"):
            await mesh.submit(name, tokens=2000)
        await mesh.prepare()
        await mesh.pause()
        await mesh.tell(
            ABORT_REQUEST, AbortRequest(request_id="a", attempt=0, replica_id="r1"), OLD
        )
        await mesh.take()
        await mesh.tell(
            ABORT_REQUEST, AbortRequest(request_id="b", attempt=0, replica_id="r1"), OLD
        )
        await mesh.start("r2", NEW, 2)
        await mesh.stop()
        made = len(mesh.tokens("c"))
        await mesh.until(lambda: len(mesh.tokens("c")) > made and mesh.cached() > 0)
        await mesh.tell(
            ABORT_REQUEST, AbortRequest(request_id="c", attempt=0, replica_id="r1"), OLD
        )
        await mesh.until(lambda: mesh.cached() == 0)

    run(scenario)


def test_a_source_that_cannot_be_reached_costs_its_own_requests_alone() -> None:
    """One old worker that has just died would undo the switch of all others."""

    async def scenario(mesh: Pair) -> None:
        await mesh.submit("a", tokens=60)
        await mesh.prepare()
        await mesh.pause()
        gone = PeerServer(worker_id="gone")  # it has no such replica
        gone.close()
        peers = mesh.peers() | {"gone": gone.address}
        await mesh.take(peers=peers, sources={"r1": OLD, "r9": "gone", "r8": "unheard-of"})
        [taken] = mesh.of(RequestsTaken)
        assert (taken.moved, taken.replayed) == (1, 0)
        assert "nothing from r9: worker gone cannot be reached" in taken.detail
        assert "nothing from r8: nobody said where" in taken.detail

    run(scenario)


def test_taking_from_nobody_is_taking_nothing() -> None:
    """A switch away from workers that have died would never come about."""

    async def scenario(mesh: Pair) -> None:
        await mesh.submit("a", tokens=60)
        await mesh.prepare()
        await mesh.pause()
        await mesh.take(peers={OLD: ""})
        [taken] = mesh.of(RequestsTaken)
        assert (taken.moved, taken.replayed, "nothing from r1" in taken.detail) == (0, 0, True)
        await mesh.start("r2", NEW, 2)
        assert mesh.of(ReplicaStarted)[0].pauses == ()

    run(scenario)


def test_a_source_that_does_not_stand_still_is_told() -> None:
    """Its requests would run at two places."""

    async def scenario(mesh: Pair) -> None:
        await mesh.submit("a", tokens=60)
        await mesh.prepare()
        await mesh.take()
        [failed] = mesh.of(ReplicaFailed)
        assert "did not stand still" in failed.detail
        await mesh.pause()
        await mesh.take()  # its repeat
        await mesh.until(lambda: mesh.of(RequestsTaken))

    run(scenario)


@pytest.mark.torch
def test_real_weights_and_cache_move_to_two_ranks(tmp_path: Path) -> None:
    """Otherwise only made-up engines could change shape in place."""
    pytest.importorskip("torch", reason="needs the torch extra")
    from services.worker.engine.torch_engine.make_model import make_model

    make_model(tmp_path)
    topology = MeshConfig(
        model=ModelSpec(model_id="tiny", path=str(tmp_path)),
        engine=EngineSpec(kind="torch", torch={"threads": 1, "kv_blocks": 128}),
        nodes=(NodeSpec(node_id="n0", gpus=2),),
    )
    both = ReplicaSpec(replica_id="r2", model_id="tiny", parallelism="tp2pp1", gpus=(NEW, OLD))

    async def everywhere(mesh: Pair, subject: Subject[Any], kind: type[Any], **more: Any) -> None:
        for rank, worker_id in enumerate(both.gpus):
            shape = mesh.of(WorkerReport)[-1].shapes[0]
            areas = areas_of(shape, Rank.of(rank, Parallelism.parse(both.parallelism)))
            copies = tuple(Copy(name, area, OLD, "r1") for name, area in areas.items())
            fields: dict[str, Any] = dict(more)
            if kind is PrepareReplica:
                fields["copies"] = copies
                rank_of = Rank.of(rank, Parallelism.parse(both.parallelism))
                fields["cache_bytes_max"] = 48 * 16 * cache_token_bytes(shape, rank_of)
            message = kind(epoch=2, worker_id=worker_id, replica=both, peers=mesh.peers(), **fields)
            await mesh.tell(subject, message, worker_id)

    def grown(mesh: Pair) -> dict[str, bool]:
        """Whether each worker's part of the KV cache has its full size by now."""
        return {
            report.worker_id: held.cache_bytes == held.cache_bytes_full > 0
            for report in mesh.of(WorkerReport)
            for held in report.replicas
            if held.replica_id == "r2"
        }

    async def scenario(mesh: Pair) -> None:
        names = [f"q{n}" for n in range(4)]
        for name in names:
            await mesh.submit(name, tokens=120)
        order: dict[str, Any] = {"sources": {"r1": OLD}, "shares": SHARES, "verify": True}
        await everywhere(mesh, PREPARE_REPLICA, PrepareReplica, **order)
        await mesh.until(lambda: len(mesh.of(ReplicaPrepared)) == 2)
        assert all(event.bytes_by_source[OLD] > 0 for event in mesh.of(ReplicaPrepared))
        await mesh.until(lambda: all(len(mesh.tokens(name)) > 2 for name in names))
        await mesh.pause()
        await mesh.take()
        [taken] = mesh.of(RequestsTaken)
        assert (taken.moved, taken.replayed) == (4, 0)
        assert set(taken.bytes_by_source) == {OLD, NEW}
        mesh.forget(ReplicaStarted)
        await everywhere(mesh, START_REPLICA, StartReplica)
        await mesh.until(lambda: len(mesh.of(ReplicaStarted)) == 2)
        await mesh.stop()
        assert grown(mesh) == {OLD: False, NEW: False}
        grow = GrowCache(epoch=2, worker_id=NEW, replica_id="r2")
        await mesh.tell(GROW_CACHE, grow, NEW)
        await mesh.until(lambda: grown(mesh) == {OLD: True, NEW: True})
        await mesh.until(lambda: all(mesh.last(name) for name in names))
        await mesh.submit("undisturbed", tokens=120, worker_id=NEW)
        await mesh.until(lambda: mesh.last("undisturbed"))
        for name in names:
            assert mesh.tokens(name) == mesh.tokens("undisturbed")

    run(scenario, topology)
