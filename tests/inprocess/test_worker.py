"""The worker as a service: real core, runtime, engine host and outbox on a bus in memory."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from services.worker.config import WorkerConfig
from services.worker.service import serve
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.errors import ConfigInvalid
from shared.ids import CountedIds
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.messages.base import DataMessage, Message, decode, encode
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    DrainReplica,
    ReplicaDrained,
    ReplicaFailed,
    ReplicaReport,
    ReplicaStarted,
    ReplicaStopped,
    StartReplica,
    StopReplica,
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
from shared.service import ServiceContext
from shared.subjects import (
    ABORT_REQUEST,
    DRAIN_REPLICA,
    REPLICA_DRAINED,
    REPLICA_FAILED,
    REPLICA_REPORT,
    REPLICA_STARTED,
    REPLICA_STOPPED,
    START_REPLICA,
    STOP_REPLICA,
    SUBMIT_REQUEST,
    TOKEN_CHUNKS,
    WORKER_REPORT,
    Subject,
)
from shared.telemetry import Metrics, TelemetryConfig, Tracing

WORKER = "n0-g0"
FAST = ModelledEngineSettings(base_s=0.001, decode_token_s=0.0, start_s=0.0)
SLOW = ModelledEngineSettings(base_s=0.02, start_s=0.0)
CONFIG = WorkerConfig(worker_id=WORKER, report_s=0.02, heartbeat_s=0.05, worker_report_s=0.05)
T = TypeVar("T", bound=Message | DataMessage)


@dataclass
class Neighbour:
    """Everybody else in the mesh: sends commands, hears everything."""

    bus: MemoryBus
    context: ServiceContext
    heard: list[Message | DataMessage] = field(default_factory=list[Message | DataMessage])

    async def listen(self, *subjects: Subject[T]) -> None:
        for subject in subjects:

            def on_delivery(delivery: Delivery, kind: type[T] = subject.message) -> None:
                self.heard.append(decode(delivery.payload, kind))

            await self.bus.subscribe(subject.wildcard, on_delivery)

    async def tell(self, subject: Subject[T], message: T) -> None:
        publish = subject.send(message, worker_id=WORKER)
        await self.bus.publish(publish.subject, encode(publish.message))

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.heard if isinstance(message, kind)]

    def chunks(self, request_id: str, attempt: int = 0) -> list[TokenChunk]:
        return [
            chunk
            for message in self.of(TokenChunks)
            for chunk in message.chunks
            if (chunk.request_id, chunk.attempt) == (request_id, attempt)
        ]

    def finish(self, request_id: str, attempt: int = 0) -> str | None:
        return next((c.finish for c in self.chunks(request_id, attempt) if c.finish), None)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # conditions are about what was heard
                await asyncio.sleep(0.002)

    async def start_replica(self) -> None:
        await self.tell(START_REPLICA, StartReplica(epoch=1, worker_id=WORKER, replica=spec()))
        await self.until(lambda: self.of(ReplicaStarted))

    async def submit(self, request_id: str, *, tokens: int = 8, attempt: int = 0) -> None:
        await self.tell(SUBMIT_REQUEST, submission(request_id, tokens=tokens, attempt=attempt))


def spec() -> ReplicaSpec:
    return ReplicaSpec(replica_id="r1", model_id="tiny", parallelism="tp1pp1", gpus=(WORKER,))


def submission(request_id: str, *, tokens: int = 8, attempt: int = 0) -> SubmitRequest:
    return SubmitRequest(
        request_id=request_id,
        attempt=attempt,
        ingress_id="i0",
        epoch=1,
        replica_id="r1",
        prompt_tokens=list(b"Tell me a story."),
        sampling=SamplingParams(output_tokens_max=tokens),
    )


@asynccontextmanager
async def worker(
    settings: ModelledEngineSettings = FAST,
    config: WorkerConfig = CONFIG,
    *,
    topology: MeshConfig | None = None,
) -> AsyncGenerator[Neighbour]:
    bus = MemoryBus()
    context = ServiceContext(
        name="worker",
        instance_id="w",
        bus=bus,
        clock=SystemClock(),
        ids=CountedIds(),
        mesh=topology or modelled_mesh(settings),
        metrics=Metrics("worker"),
        tracing=Tracing(TelemetryConfig(), service="worker", instance_id="w"),
    )
    neighbour = Neighbour(bus, context)
    await neighbour.listen(TOKEN_CHUNKS)
    await neighbour.listen(REPLICA_STARTED)
    await neighbour.listen(REPLICA_DRAINED)
    await neighbour.listen(REPLICA_STOPPED)
    await neighbour.listen(REPLICA_REPORT)
    await neighbour.listen(WORKER_REPORT)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(config, context))
        await neighbour.until(lambda: neighbour.of(WorkerReport))
        yield neighbour
        context.stopping.set()


def modelled_mesh(settings: ModelledEngineSettings) -> MeshConfig:
    return MeshConfig(
        model=ModelSpec(model_id="tiny"),
        engine=EngineSpec(kind="modelled", modelled=settings),
        nodes=(NodeSpec(node_id="n0", gpus=2),),
    )


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_submission_is_acknowledged_and_answered_without_gaps() -> None:
    """Otherwise clients would get streams with holes, or the ingress would try elsewhere."""

    async def scenario() -> None:
        async with worker() as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=8)
            await mesh.until(lambda: mesh.finish("a"))
            first, *rest = mesh.chunks("a")
            assert (first.tokens, first.finish) == ([], None)
            assert [chunk.position for chunk in rest] == list(range(8))
            assert all(len(chunk.tokens) == 1 for chunk in rest)
            assert [chunk.finish for chunk in rest] == [None] * 7 + ["length"]

    run(scenario)


def test_chunks_of_one_step_share_a_message() -> None:
    """Otherwise the broker would carry one message per token and request."""

    async def scenario() -> None:
        async with worker() as mesh:
            await mesh.start_replica()
            for n in range(20):
                await mesh.submit(f"q{n}", tokens=10)
            await mesh.until(lambda: all(mesh.finish(f"q{n}") for n in range(20)))
            with_tokens = [m for m in mesh.of(TokenChunks) if any(c.tokens for c in m.chunks)]
            assert len(with_tokens) <= 12

    run(scenario)


def test_repeated_submission_is_not_run_twice() -> None:
    """Otherwise a repeated message would cost a request's work again, and mix two streams."""

    async def scenario() -> None:
        async with worker() as mesh:
            await mesh.start_replica()
            await mesh.submit("a")
            await mesh.submit("a")
            await mesh.until(lambda: mesh.finish("a"))
            await mesh.submit("a")
            await asyncio.sleep(0.05)
            assert sum(len(chunk.tokens) for chunk in mesh.chunks("a")) == 8

    run(scenario)


def test_newer_attempt_replaces_the_older_and_tells_the_same() -> None:
    """Otherwise a resubmitted request would hold two places in the batch."""

    async def scenario() -> None:
        async with worker(SLOW) as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=10)
            await mesh.until(lambda: len(mesh.chunks("a")) > 3)
            await mesh.submit("a", tokens=10, attempt=1)
            await mesh.until(lambda: mesh.finish("a", 1))
            assert mesh.finish("a", 0) is None
            old = [token for chunk in mesh.chunks("a", 0) for token in chunk.tokens]
            new = [token for chunk in mesh.chunks("a", 1) for token in chunk.tokens]
            assert new[: len(old)] == old
            assert len(new) == 10

    run(scenario)


def test_abort_ends_the_stream_and_frees_the_engine() -> None:
    """Otherwise a client that hangs up would go on using the GPU."""

    async def scenario() -> None:
        async with worker(SLOW) as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=1000)
            await mesh.until(lambda: len(mesh.chunks("a")) > 2)
            await mesh.tell(ABORT_REQUEST, AbortRequest(request_id="a", attempt=0, replica_id="r1"))
            await mesh.until(lambda: mesh.of(ReplicaReport)[-1].running == 0)
            count = len(mesh.chunks("a"))
            await asyncio.sleep(0.06)
            assert len(mesh.chunks("a")) == count
            assert mesh.of(ReplicaReport)[-1].kv_blocks_used == 0

    run(scenario)


def test_overload_and_excess_length_are_refused() -> None:
    """Otherwise the queue would grow without bound, and requests would wait in vain."""

    async def scenario() -> None:
        small = ModelledEngineSettings(base_s=0.05, start_s=0.0, running_max=1, waiting_max=1)
        async with worker(small) as mesh:
            await mesh.start_replica()
            for n in range(3):
                await mesh.submit(f"q{n}", tokens=5)
            await mesh.submit("long", tokens=10**6)
            await mesh.until(lambda: mesh.finish("long"))
            assert mesh.chunks("long")[-1].failure == "too_long"
            assert mesh.finish("q2") == "refused"
            assert mesh.chunks("q2")[-1].failure == "overloaded"
            await mesh.until(lambda: mesh.finish("q1"))
            assert (mesh.finish("q0"), mesh.finish("q1")) == ("length", "length")

    run(scenario)


def test_drain_lets_finish_what_can_and_hands_back_the_rest() -> None:
    """Otherwise a switch would drop requests, or never end."""

    async def scenario() -> None:
        async with worker(SLOW) as mesh:
            await mesh.start_replica()
            await mesh.submit("short", tokens=3)
            await mesh.submit("long", tokens=1000)
            await mesh.until(lambda: mesh.chunks("long"))
            await mesh.tell(
                DRAIN_REPLICA,
                DrainReplica(epoch=2, worker_id=WORKER, replica_id="r1", timeout_s=0.2),
            )
            await mesh.until(lambda: mesh.of(ReplicaReport)[-1].phase == "draining")
            await mesh.submit("late")
            await mesh.until(lambda: mesh.of(ReplicaDrained))
            assert mesh.of(ReplicaDrained)[0].handed_back == 1
            await mesh.until(lambda: mesh.finish("long"))
            assert mesh.finish("short") == "length"
            assert mesh.finish("late") == "refused"
            assert (mesh.finish("long"), mesh.chunks("long")[-1].failure) == ("failed", "draining")
            positions = [c.position for c in mesh.chunks("long") if c.tokens]
            assert positions == list(range(len(positions)))
            await mesh.tell(STOP_REPLICA, StopReplica(epoch=2, worker_id=WORKER, replica_id="r1"))
            await mesh.until(lambda: mesh.of(ReplicaStopped))
            await mesh.until(lambda: mesh.of(WorkerReport)[-1].replicas == ())

    run(scenario)


def test_heartbeats_come_while_chunks_do_not() -> None:
    """Otherwise the ingress would take a long prefill for a dead replica."""

    async def scenario() -> None:
        async with worker(ModelledEngineSettings(base_s=0.5, start_s=0.0)) as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=1)
            await mesh.until(lambda: sum(not m.chunks for m in mesh.of(TokenChunks)) >= 3)
            assert mesh.finish("a") is None
            incarnations = {m.incarnation for m in mesh.of(TokenChunks)}
            assert incarnations == {mesh.of(WorkerReport)[-1].incarnation}
            await mesh.until(lambda: mesh.finish("a"))

    run(scenario)


def test_termination_drains_and_says_goodbye() -> None:
    """Otherwise each rolling restart would cost requests, and routers would go on sending."""

    async def scenario() -> None:
        async with worker(SLOW) as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=6)
            await mesh.until(lambda: len(mesh.chunks("a")) > 1)
            mesh.context.stopping.set()
            await mesh.until(lambda: mesh.of(WorkerReport)[-1].leaving)
            await mesh.until(lambda: mesh.of(ReplicaStopped))
            last = mesh.of(WorkerReport)[-1]
            assert last.leaving
            assert last.replicas == ()
            assert mesh.finish("a") == "length"

    run(scenario)


def test_replica_starts_again_after_a_stop() -> None:
    """Otherwise a reshaped GPU could never serve again."""

    async def scenario() -> None:
        async with worker() as mesh:
            await mesh.start_replica()
            await mesh.tell(STOP_REPLICA, StopReplica(epoch=2, worker_id=WORKER, replica_id="r1"))
            await mesh.until(lambda: mesh.of(ReplicaStopped))
            mesh.heard.clear()
            await mesh.tell(START_REPLICA, StartReplica(epoch=2, worker_id=WORKER, replica=spec()))
            await mesh.until(lambda: mesh.of(ReplicaStarted))
            await mesh.submit("b")
            await mesh.until(lambda: mesh.finish("b"))

    run(scenario)


@pytest.mark.torch
def test_torch_engine_serves_behind_the_same_worker(tmp_path: Path) -> None:
    """Otherwise the modelled mesh would run, and the one with real tokens not."""
    pytest.importorskip("torch", reason="needs the torch extra")
    from services.worker.engine.torch_engine.make_model import make_model

    make_model(tmp_path)
    topology = MeshConfig(
        model=ModelSpec(model_id="tiny", path=str(tmp_path)),
        engine=EngineSpec(kind="torch", torch={"threads": 1, "kv_blocks": 64}),
        nodes=(NodeSpec(node_id="n0"),),
    )

    async def scenario() -> None:
        async with worker(topology=topology) as mesh:
            await mesh.start_replica()
            await mesh.submit("a", tokens=12)
            await mesh.submit("long", tokens=10**6)
            await mesh.until(lambda: mesh.finish("a") and mesh.finish("long"))
            tokens = [token for chunk in mesh.chunks("a") for token in chunk.tokens]
            assert len(tokens) == 12 or mesh.finish("a") == "stop"
            assert mesh.chunks("long")[-1].failure == "too_long"

    run(scenario)


@pytest.mark.torch
def test_bad_checkpoint_is_reported_with_its_cause(tmp_path: Path) -> None:
    """Otherwise an operator would see a replica that never comes up, and not why."""
    pytest.importorskip("torch", reason="the torch extra is not installed")
    from services.worker.engine.torch_engine.make_model import make_model

    folder = tmp_path / "cut"
    make_model(folder, size="tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])  # as a broken download leaves it
    topology = MeshConfig(
        model=ModelSpec(model_id="tiny", path=str(folder)),
        engine=EngineSpec(kind="torch"),
        nodes=(NodeSpec(node_id="n0"),),
    )

    async def scenario() -> None:
        async with worker(topology=topology) as mesh:
            await mesh.listen(REPLICA_FAILED)
            await mesh.tell(START_REPLICA, StartReplica(epoch=1, worker_id=WORKER, replica=spec()))
            await mesh.until(lambda: mesh.of(ReplicaFailed))
            assert "model.safetensors" in mesh.of(ReplicaFailed)[0].detail
            assert mesh.of(WorkerReport)[-1].replicas[0].phase == "failed"

    run(scenario)


def test_worker_without_a_gpu_in_the_topology_is_refused() -> None:
    """Otherwise a typing error would start a worker that nobody ever uses."""

    async def scenario() -> None:
        with pytest.raises(ExceptionGroup) as raised:
            async with worker(config=WorkerConfig(worker_id="n9-g9")):
                pass
        assert raised.group_contains(ConfigInvalid, match="n0-g0, n0-g1")

    run(scenario)
