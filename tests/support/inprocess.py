"""The whole mesh in one event loop: the real services on a real broker, the modelled engine."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from services.forecaster.config import ForecasterConfig
from services.forecaster.service import serve as serve_forecaster
from services.ingress.config import IngressConfig
from services.ingress.service import serve as serve_ingress
from services.profiler.config import ProfilerConfig
from services.profiler.service import serve as serve_profiler
from services.router.config import RouterConfig
from services.router.service import serve as serve_router
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import serve as serve_scheduler
from services.switcher.config import SwitcherConfig
from services.switcher.service import serve as serve_switcher
from services.worker.config import WorkerConfig
from services.worker.service import serve as serve_worker
from shared.bus import BusConfig, NatsBus
from shared.clock import SystemClock
from shared.ids import RandomIds
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.models import ModelSpec
from shared.service import ServiceContext
from shared.telemetry import Metrics, TelemetryConfig, Tracing
from tests.support.broker import free_port

READY_TIMEOUT_S = 20.0
Serve = Callable[[Any, ServiceContext], Awaitable[None]]


def modelled_mesh(*, gpus: int = 2, **engine: float) -> MeshConfig:
    """``gpus`` single-GPU replicas of the modelled engine."""
    settings = msgspec.convert({"start_s": 0.01} | engine, ModelledEngineSettings)
    return MeshConfig(
        name="test",
        model=ModelSpec(model_id="modelled", context_tokens_max=2048),
        engine=EngineSpec(modelled=settings),
        nodes=(NodeSpec(node_id="n0", gpus=gpus),),
        replicas=tuple(ReplicaWish(replica_id=f"r{i}") for i in range(gpus)),
    )


@dataclass
class InprocessMesh:
    """Handles on a running mesh. ``stop`` ends a service as SIGTERM would, ``kill`` as a crash."""

    url: str
    mesh: MeshConfig
    broker_url: str
    otlp_endpoint: str = ""
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, "asyncio.Task[None]"])
    contexts: dict[str, ServiceContext] = field(default_factory=dict[str, ServiceContext])

    async def start(self, name: str, serve: Serve, config: object) -> None:
        service = name.partition("-")[0]
        bus = NatsBus(BusConfig(url=self.broker_url))
        await bus.connect(name=name)
        context = ServiceContext(
            name=service,
            instance_id=name,
            bus=bus,
            clock=SystemClock(),
            ids=RandomIds(),
            mesh=self.mesh,
            metrics=Metrics(service),
            tracing=Tracing(
                TelemetryConfig(otlp_endpoint=self.otlp_endpoint),
                service=service,
                instance_id=name,
            ),
        )
        self.contexts[name] = context
        self.tasks[name] = asyncio.create_task(self._run(serve, config, context), name=name)

    async def _run(self, serve: Serve, config: object, context: ServiceContext) -> None:
        try:
            await serve(config, context)
        finally:
            await context.bus.close()
            await asyncio.to_thread(context.tracing.close)

    async def stop(self, name: str) -> None:
        self.contexts[name].stopping.set()
        await asyncio.wait_for(self.tasks.pop(name), 20.0)

    async def kill(self, name: str) -> None:
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def wait_ready(self) -> None:
        async with aiohttp.ClientSession() as session, asyncio.timeout(READY_TIMEOUT_S):
            while True:
                for task in self.tasks.values():
                    if task.done():
                        task.result()
                try:
                    async with session.get(f"{self.url}/ready") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.02)


@asynccontextmanager
async def inprocess_mesh(
    broker_url: str, mesh: MeshConfig, *, routers: int = 1, otlp: str = "", **ingress: Any
) -> AsyncGenerator[InprocessMesh]:
    """Start everything, wait until ready, stop everything at the end."""
    port = free_port()
    running = InprocessMesh(f"http://127.0.0.1:{port}", mesh, broker_url, otlp)
    scheduler = SchedulerConfig(settle_s=0.1, start_wait_s=5.0)
    try:
        await running.start("switcher", serve_switcher, SwitcherConfig())
        await running.start("scheduler", serve_scheduler, scheduler)
        await running.start("profiler", serve_profiler, ProfilerConfig())
        await running.start("forecaster", serve_forecaster, ForecasterConfig())
        for index in range(routers):
            await running.start(f"router-{index}", serve_router, RouterConfig())
        for gpu in mesh.gpus():
            config = WorkerConfig(worker_id=gpu.gpu_id)
            await running.start(f"worker-{gpu.gpu_id}", serve_worker, config)
        await running.start("ingress", serve_ingress, IngressConfig(port=port, **ingress))
        await running.wait_ready()
        yield running
    finally:
        await asyncio.gather(*(running.kill(name) for name in list(running.tasks)))
