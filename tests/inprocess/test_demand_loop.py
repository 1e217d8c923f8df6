"""Router, profiler and forecaster driven by the real runtime, over the in-memory bus."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from services.forecaster.config import ForecasterConfig
from services.forecaster.service import serve as serve_forecaster
from services.profiler.config import ProfilerConfig
from services.profiler.service import serve as serve_profiler
from services.router.config import RouterConfig
from services.router.service import serve as serve_router
from shared import subjects
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.clock import SystemClock
from shared.errors import ConfigInvalid
from shared.ids import CountedIds
from shared.mesh import MeshConfig
from shared.messages.base import Message, decode, encode
from shared.messages.demand import ForecastReport, ProfilerState
from shared.messages.plans import DeploymentPlan, ReplicaSpec, StoredPlan
from shared.messages.replicas import ReplicaReport
from shared.messages.requests import (
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    RouteRequest,
)
from shared.models import ModelSpec
from shared.service import ServiceContext
from shared.telemetry import Metrics, TelemetryConfig, Tracing

MODEL = MeshConfig().model.model_id
Serve = Callable[[Any, ServiceContext], Awaitable[None]]


def context_of(name: str, bus: MemoryBus, mesh: MeshConfig | None = None) -> ServiceContext:
    return ServiceContext(
        name=name,
        instance_id=f"{name}-1",
        bus=bus,
        clock=SystemClock(),
        ids=CountedIds(),
        mesh=mesh or MeshConfig(),
        metrics=Metrics(name),
        tracing=Tracing(TelemetryConfig(), service=name, instance_id=f"{name}-1"),
    )


@asynccontextmanager
async def running(
    name: str, serve: Serve, config: msgspec.Struct, bus: MemoryBus, mesh: MeshConfig | None = None
) -> AsyncGenerator[None]:
    """The service for the length of the block; it must end when told to."""
    context = context_of(name, bus, mesh)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(_serve(serve, config, context))
        await asyncio.sleep(0)
        try:
            yield
        finally:
            context.stopping.set()
            await asyncio.wait_for(task, 5.0)


async def _serve(serve: Serve, config: msgspec.Struct, context: ServiceContext) -> None:
    await serve(config, context)


async def heard(bus: MemoryBus, subject: subjects.Subject[Any]) -> asyncio.Queue[Message]:
    queue: asyncio.Queue[Message] = asyncio.Queue(100)

    def on_delivery(delivery: Delivery) -> None:
        queue.put_nowait(decode(delivery.payload, subject.message))

    await bus.subscribe(subject.wildcard, on_delivery)
    return queue


async def send(
    bus: MemoryBus, subject: subjects.Subject[Any], message: Message, **tokens: str
) -> None:
    await bus.publish(subject.send(message, **tokens).subject, encode(message))


async def test_a_router_finds_the_plan_and_answers() -> None:
    """The ingress would get no route from a router that runs."""
    bus = MemoryBus()
    spec = ReplicaSpec(replica_id="a", model_id=MODEL, parallelism="tp1pp1", gpus=("n0-g0",))
    stored = StoredPlan(epoch=4, in_force=DeploymentPlan(plan_id="p", replicas=(spec,)))
    await bus.store("plan", encode(stored), revision=0)
    report = ReplicaReport(
        replica_id="a", worker_id="n0-g0", incarnation="i", epoch=4, phase="serving", running_max=8
    )
    question = RouteRequest(
        request_id="q", model_id=MODEL, input_tokens=5, output_tokens_max=5, attempt=1
    )
    async with running("router", serve_router, RouterConfig(), bus):
        await asyncio.sleep(0.01)
        await send(bus, subjects.REPLICA_REPORT, report, replica_id="a")
        payload = await bus.request(subjects.ROUTE.pattern, encode(question), timeout_s=5.0)
    reply = decode(payload, RouteReply)
    assert (reply.replica_id, reply.leader_id, reply.epoch, reply.attempt) == ("a", "n0-g0", 4, 1)


async def test_completions_become_a_forecast_and_a_stored_state() -> None:
    """The scheduler would hear nothing of the traffic, and the profiler forget its types."""
    bus = MemoryBus()
    forecasts = await heard(bus, subjects.FORECAST_REPORT)
    done = tuple(
        RequestCompleted(
            request_id=f"q{i}",
            outcome="completed",
            model_id=MODEL,
            input_tokens=100,
            output_tokens=20,
        )
        for i in range(10)
    )
    batch = RequestsCompleted(ingress_id="i", completed=done)
    async with (
        running("profiler", serve_profiler, ProfilerConfig(window_s=0.2), bus),
        running("forecaster", serve_forecaster, ForecasterConfig(), bus),
    ):
        await asyncio.sleep(0.01)
        await send(bus, subjects.REQUESTS_COMPLETED, batch, ingress_id="i")
        async with asyncio.timeout(5.0):
            while True:
                report = await forecasts.get()
                assert isinstance(report, ForecastReport)
                if report.types:
                    break
    assert report.types[0].input_tokens_mean == pytest.approx(100.0)
    value, _ = await bus.load("profiler")
    assert value is not None
    assert len(decode(value, ProfilerState).models[0].types) == 1


async def test_each_model_has_its_own_forecast() -> None:
    """The scheduler would give one model the GPUs that another model's requests need."""
    bus = MemoryBus()
    forecasts = await heard(bus, subjects.FORECAST_REPORT)
    lengths = {"m": (100, 20), "n": (3000, 400)}
    done = tuple(
        RequestCompleted(
            request_id=f"{model_id}{i}",
            outcome="completed",
            model_id=model_id,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        for model_id, (input_tokens, output_tokens) in lengths.items()
        for i in range(10)
    )
    mesh = MeshConfig(model=ModelSpec(model_id="m"), more_models=(ModelSpec(model_id="n"),))
    seen: dict[str, tuple[float, float]] = {}
    async with (
        running("profiler", serve_profiler, ProfilerConfig(window_s=0.2), bus, mesh),
        running("forecaster", serve_forecaster, ForecasterConfig(), bus, mesh),
    ):
        await asyncio.sleep(0.01)
        batch = RequestsCompleted(ingress_id="i", completed=done)
        await send(bus, subjects.REQUESTS_COMPLETED, batch, ingress_id="i")
        async with asyncio.timeout(5.0):
            while len(seen) < len(lengths):
                report = await forecasts.get()
                assert isinstance(report, ForecastReport)
                for kind in report.types:
                    seen[report.model_id] = (kind.input_tokens_mean, kind.output_tokens_mean)
    for model_id, means in lengths.items():
        assert seen[model_id] == pytest.approx(means)


@pytest.mark.parametrize(
    ("name", "serve", "config"),
    [
        ("profiler", serve_profiler, ProfilerConfig(models_max=1)),
        ("forecaster", serve_forecaster, ForecasterConfig(models_max=1)),
    ],
)
async def test_a_topology_with_too_many_models_is_refused(
    name: str, serve: Serve, config: msgspec.Struct
) -> None:
    """The models beyond the bound would be planned without any word of their demand."""
    mesh = MeshConfig(more_models=(ModelSpec(model_id="n"),))
    with pytest.raises(ConfigInvalid, match="2 or more") as caught:
        await serve(config, context_of(name, MemoryBus(), mesh))
    assert caught.value.field == f"{name}.models_max"


@pytest.mark.parametrize(
    ("name", "serve", "config"),
    [
        ("router", serve_router, RouterConfig(report_dead_s=0.1)),
        ("profiler", serve_profiler, ProfilerConfig(window_s=0.0)),
        ("forecaster", serve_forecaster, ForecasterConfig(ewma_rate=2.0)),
    ],
)
async def test_a_service_refuses_wrong_settings(
    name: str, serve: Serve, config: msgspec.Struct
) -> None:
    """It would start and misbehave, instead of naming the setting."""
    with pytest.raises(ConfigInvalid, match=name):
        await serve(config, context_of(name, MemoryBus()))
