"""Composes the ingress: gateway on the bus, HTTP edge on a socket, drain on SIGTERM."""

import asyncio
import logging

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from services.ingress.admission import Admission
from services.ingress.config import IngressConfig
from services.ingress.gateway import Gateway
from services.ingress.http import HttpEdge
from services.ingress.keys import KeyRing
from shared.errors import ConfigInvalid
from shared.service import ServiceContext
from shared.text import byte_tokenizer, load_tokenizer

log = logging.getLogger("oserve.ingress")

BACKLOG = 4096


async def serve(config: IngressConfig, context: ServiceContext) -> None:
    model = context.mesh.model
    keys = KeyRing.load(config.keys_file)
    if keys.open:
        log.warning("ingress.open", extra={"reason": "no keys_file: anyone may send requests"})
    tokenizer = load_tokenizer(model.path) if model.path else byte_tokenizer()
    admission = Admission(config, keys=keys, model=model, tokenizer=tokenizer)
    gateway = Gateway(config, context)
    edge = HttpEdge(config, context, gateway, admission)
    runner = web.AppRunner(
        edge.app(),
        handler_cancellation=True,
        keepalive_timeout=config.keepalive_s,
        access_log=None,
        handle_signals=False,
    )
    await runner.setup()
    server = await _listen(runner, config, context)
    work = asyncio.create_task(gateway.run())
    stop = asyncio.create_task(context.stopping.wait())
    try:
        await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        await _drain(server, gateway, config)
    finally:
        server.close()
        stop.cancel()
        work.cancel()
        await asyncio.gather(work, stop, return_exceptions=True)
        await runner.cleanup()
        admission.close()


async def _listen(
    runner: web.AppRunner, config: IngressConfig, context: ServiceContext
) -> asyncio.Server:
    factory = runner.server
    assert factory is not None
    loop = asyncio.get_running_loop()
    connections = context.metrics.gauge("ingress_connections", "Open client connections")
    connections.set_function(lambda: len(factory.connections))
    refused = context.metrics.counter("ingress_connections_refused", "Closed: too many, or idle")

    def connection() -> asyncio.Protocol:
        handler = factory()
        loop.call_soon(_admit, handler)
        loop.call_later(config.first_request_s, _close_if_unused, handler)
        return handler

    def _admit(handler: RequestHandler) -> None:
        if len(factory.connections) > config.connections_max and handler.transport is not None:
            refused.inc()
            handler.transport.abort()

    def _close_if_unused(handler: RequestHandler) -> None:
        """A connection that never sent a whole request head holds a descriptor for nothing."""
        unused = handler._request_count == 0  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # aiohttp has no public count
        if unused and handler.transport is not None:
            refused.inc()
            handler.transport.abort()

    try:
        server = await loop.create_server(
            connection, config.host, config.port, backlog=BACKLOG, reuse_address=True
        )
    except OSError as error:
        raise ConfigInvalid(
            field="ingress.port",
            value=config.port,
            remedy=f"cannot listen on {config.host}: {error.strerror}; choose another port",
        ) from None
    port = server.sockets[0].getsockname()[1]
    log.info("ingress.listening", extra={"url": f"http://{config.host}:{port}"})
    return server


async def _drain(server: asyncio.Server, gateway: Gateway, config: IngressConfig) -> None:
    """Accept nothing new, let what is open end, publish the last completions."""
    server.close()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + config.drain_timeout_s
    while gateway.core.open_requests and loop.time() < deadline_s:  # noqa: ASYNC110  # once a life
        await asyncio.sleep(0.02)
    if gateway.core.open_requests:
        log.warning("drain.timeout", extra={"open_requests": gateway.core.open_requests})
    gateway.flush_completed()
    await asyncio.sleep(0.02)
