"""Guards the listening socket: how many connections there are, and that none is held for nothing.

A client costs a descriptor and its buffers, so it has to get on with it: send a request head soon,
and read what it was sent. aiohttp itself closes connections that idle between requests.
"""

import asyncio
import logging
import resource

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from services.ingress.config import IngressConfig
from shared.errors import ConfigInvalid
from shared.telemetry import Metrics

log = logging.getLogger("oserve.ingress")

BACKLOG = 4096
DESCRIPTORS_RESERVED = 256  # for the broker, logs, metrics


class Connections:
    def __init__(self, config: IngressConfig, server: web.Server, metrics: Metrics) -> None:
        self._config, self._server = config, server
        self._connections_max = affordable(config.connections_max)
        self._stuck: dict[RequestHandler, tuple[int, float]] = {}  # unread bytes, since when
        open_now = metrics.gauge("ingress_connections", "Open client connections")
        open_now.set_function(lambda: len(server.connections))
        self._refused = metrics.counter(
            "ingress_connections_closed", "Closed by us: too many, unused or unread", ["reason"]
        )

    async def listen(self) -> asyncio.Server:
        """Raises ConfigInvalid."""
        config = self._config
        try:
            server = await asyncio.get_running_loop().create_server(
                self._accept, config.host, config.port, backlog=BACKLOG, reuse_address=True
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

    async def watch(self) -> None:
        """Close what is not read, until cancelled."""
        period_s = self._config.client_read_s / 4
        while True:
            await asyncio.sleep(period_s)
            self._close_unread(asyncio.get_running_loop().time())

    def _accept(self) -> asyncio.Protocol:
        handler = self._server()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._admit, handler)
        loop.call_later(self._config.first_request_s, self._close_if_unused, handler)
        return handler

    def _admit(self, handler: RequestHandler) -> None:
        if len(self._server.connections) > self._connections_max:
            self._close(handler, "too_many")

    def _close_if_unused(self, handler: RequestHandler) -> None:
        """It never sent a whole request head."""
        if handler._request_count == 0:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # aiohttp has no public count
            self._close(handler, "unused")

    def _close_unread(self, now_s: float) -> None:
        """A client that stops reading would keep its answer in our memory for ever: TCP itself
        finds nothing wrong with a peer whose window is closed."""
        stuck: dict[RequestHandler, tuple[int, float]] = {}
        for handler in self._server.connections:
            transport = handler.transport
            unread_bytes = transport.get_write_buffer_size() if transport is not None else 0
            if unread_bytes == 0:
                continue
            known_bytes, since_s = self._stuck.get(handler, (0, now_s))
            if known_bytes == 0 or unread_bytes < known_bytes:
                since_s = now_s
            stuck[handler] = (unread_bytes, since_s)
            if now_s - since_s >= self._config.client_read_s:
                self._close(handler, "unread")
        self._stuck = stuck

    def _close(self, handler: RequestHandler, reason: str) -> None:
        transport = handler.transport
        if transport is not None:
            self._refused.labels(reason).inc()
            transport.abort()


def affordable(connections_max: int) -> int:
    """``connections_max``, or what the process's limit of descriptors leaves of it. The soft limit
    is raised first: a default of 1024 would stop an ingress at a thousand clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + DESCRIPTORS_RESERVED
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections_max
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    except (ValueError, OSError):  # the kernel's own limit is below "unlimited"
        allowed = soft
    if allowed == wanted:
        return connections_max
    left = max(1, allowed - DESCRIPTORS_RESERVED)
    remedy = "raise the limit of open files (ulimit -n), or lower ingress.connections_max"
    fields = {"connections_max": connections_max, "possible": left, "remedy": remedy}
    log.warning("ingress.few_descriptors", extra=fields)
    return left
