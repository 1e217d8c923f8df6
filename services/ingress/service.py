"""Composes the ingress: gateway on the bus, HTTP edge on a socket, drain on SIGTERM."""

import asyncio
import logging

from aiohttp import web

from services.ingress.admission import Admission
from services.ingress.config import IngressConfig
from services.ingress.connections import Connections
from services.ingress.gateway import Gateway
from services.ingress.http import HttpEdge
from services.ingress.keys import KeyRing
from services.ingress.models import ServedModels
from shared.errors import ConfigInvalid
from shared.service import ServiceContext

log = logging.getLogger("oserve.ingress")

FLUSH_S = 2.0  # for the broker to take our last messages
HANDLERS_S = 1.0  # for cancelled requests to end


async def serve(config: IngressConfig, context: ServiceContext) -> None:
    keys = KeyRing.load(config.keys_file)
    if keys.open:
        log.warning("ingress.open", extra={"reason": "no keys_file: anyone may send requests"})
    admission = Admission(config, keys=keys, models=ServedModels(context.mesh.models))
    gateway = Gateway(config, context)
    edge = HttpEdge(config, context, gateway, admission)
    runner = web.AppRunner(
        edge.app(),
        handler_cancellation=True,
        keepalive_timeout=config.keepalive_s,
        access_log=None,
        shutdown_timeout=HANDLERS_S,
        handle_signals=False,
    )
    await runner.setup()
    assert runner.server is not None
    connections = Connections(config, runner.server, context.metrics)
    try:
        server = await connections.listen()
    except ConfigInvalid:
        await runner.cleanup()
        raise
    work = asyncio.create_task(_work(gateway, connections))
    stop = asyncio.create_task(context.stopping.wait())
    try:
        await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        edge.drain()
        await _drain(server, gateway, config)
    finally:
        server.close()
        stop.cancel()
        # Cancels what is still open, which aborts it in the mesh: the gateway has to outlive it.
        await runner.cleanup()
        gateway.flush_completed()
        if not work.done():
            await gateway.outbox.flush(FLUSH_S)
        work.cancel()
        await asyncio.gather(work, stop, return_exceptions=True)
        admission.close()


async def _work(gateway: Gateway, connections: Connections) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gateway.run())
        tasks.create_task(connections.watch())


async def _drain(server: asyncio.Server, gateway: Gateway, config: IngressConfig) -> None:
    """Accept nothing new, and let what is open end."""
    server.close()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + config.drain_timeout_s
    while gateway.core.open_requests and loop.time() < deadline_s:  # noqa: ASYNC110  # once a life
        await asyncio.sleep(0.02)
    if gateway.core.open_requests:
        log.warning("drain.timeout", extra={"open_requests": gateway.core.open_requests})
