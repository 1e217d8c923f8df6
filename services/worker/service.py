"""Wires the worker's core to the bus, and its engines to their event loop and threads."""

import asyncio

from services.worker.config import WorkerConfig
from services.worker.core import INPUTS, WorkerCore
from services.worker.data_plane import ChunksApart, DataPlane
from services.worker.engine.factory import engine_factory
from services.worker.identity import WorkerIdentity
from services.worker.outbox import Outbox
from shared.errors import ConfigInvalid
from shared.ids import IdSource
from shared.mesh import MeshConfig
from shared.messages.base import Message
from shared.runtime import Wiring
from shared.service import ServiceContext

STOP_MARGIN_S = 10.0  # after a drain, for engines to close


async def serve(config: WorkerConfig, context: ServiceContext) -> None:
    """Host replicas until the process is told to end and has drained."""
    identity = _identity(config.checked(), context.mesh, context.ids)
    factory = engine_factory(context.mesh)
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
        plane = DataPlane(
            config,
            factory,
            outbox=outbox,
            context=context,
            tasks=tasks,
            feed=feed,
        )
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


def _identity(config: WorkerConfig, mesh: MeshConfig, ids: IdSource) -> WorkerIdentity:
    gpu = next((gpu for gpu in mesh.gpus() if gpu.gpu_id == config.worker_id), None)
    if gpu is None:
        known = ", ".join(gpu.gpu_id for gpu in mesh.gpus()) or "none"
        raise ConfigInvalid(
            field="worker.worker_id",
            value=config.worker_id,
            remedy=f"name a GPU of the topology's [[mesh.nodes]]: {known}",
        )
    return WorkerIdentity(
        worker_id=config.worker_id,
        incarnation=ids.next("run"),
        node_id=mesh.node_of(config.worker_id),
        gpu=gpu,
        models=mesh.model_ids,
    )
