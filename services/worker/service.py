"""Wires the worker's core to the bus, and its engines to their event loop and threads."""

import asyncio

from services.worker.config import WorkerConfig
from services.worker.core import INPUTS, WorkerCore
from services.worker.data_plane import ChunksApart, DataPlane
from services.worker.engine.factory import EngineFactory, engine_factory
from services.worker.host_context import HostContext
from services.worker.identity import WorkerIdentity
from services.worker.outbox import Outbox
from services.worker.peers.server import PeerServer
from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec
from shared.mesh import MeshConfig
from shared.messages.base import Message
from shared.runtime import Wiring
from shared.service import ServiceContext

STOP_MARGIN_S = 10.0  # after a drain, for engines to close


async def serve(config: WorkerConfig, context: ServiceContext) -> None:
    """Host replicas until the process is told to end and has drained."""
    config.checked()
    gpu = _gpu(config, context.mesh)
    peers = PeerServer(worker_id=config.worker_id, host=config.peer_host, port=config.peer_port)
    try:
        factory = engine_factory(context.mesh, peers=peers)
        identity = WorkerIdentity(
            worker_id=config.worker_id,
            incarnation=context.ids.next("run"),
            node_id=context.mesh.node_of(config.worker_id),
            gpu=gpu,
            models=context.mesh.model_ids,
            peer=peers.address,
            shapes=factory.shapes,
            followers=factory.follow is not None,
        )
        await _run(config, context, identity, factory, peers)
    finally:
        peers.close()


async def _run(
    config: WorkerConfig,
    context: ServiceContext,
    identity: WorkerIdentity,
    factory: EngineFactory,
    peers: PeerServer,
) -> None:
    core = WorkerCore(config, identity)
    outbox = Outbox(
        context.bus,
        incarnation=identity.incarnation,
        delay_s=config.ack_delay_s,
        metrics=context.metrics,
    )

    def feed(event: Message) -> None:
        runtime.feed(event)

    async with asyncio.TaskGroup() as tasks:
        hosts = HostContext(
            config=config,
            factory=factory,
            outbox=outbox,
            clock=context.clock,
            feed=feed,
            tasks=tasks,
            peers=peers,
        )
        plane = DataPlane(hosts, context.metrics)
        wiring = Wiring(
            inputs=[subject.of(worker_id=config.worker_id) for subject in INPUTS],
            jobs=plane.jobs(),
            inbox_max=config.inbox_max,
            drained=lambda: core.drained,
            drain_timeout_s=config.drain_timeout_s + STOP_MARGIN_S,
        )
        runtime = context.runtime(ChunksApart(core, outbox), wiring)
        sender = tasks.create_task(outbox.run())
        await runtime.run(context.stopping)
        sender.cancel()
        plane.close()
        await outbox.flush()


def _gpu(config: WorkerConfig, mesh: MeshConfig) -> GpuSpec:
    gpu = next((gpu for gpu in mesh.gpus() if gpu.gpu_id == config.worker_id), None)
    if gpu is None:
        known = ", ".join(gpu.gpu_id for gpu in mesh.gpus()) or "none"
        raise ConfigInvalid(
            field="worker.worker_id",
            value=config.worker_id,
            remedy=f"name a GPU of the topology's [[mesh.nodes]]: {known}",
        )
    return gpu
