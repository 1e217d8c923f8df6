"""Is anybody listening there? Asked before the real connection, which answers slower and vaguer."""

import asyncio
import logging
from contextlib import suppress
from urllib.parse import urlsplit

from shared.errors import BusUnavailable, ConfigInvalid

log = logging.getLogger("oserve.bus")

ATTEMPT_TIMEOUT_S = 2.0
PAUSE_S = 0.05
DEFAULT_PORT = 4222


def broker_address(url: str) -> tuple[str, int]:
    """Host and port of ``url``, without its credentials; raises ConfigInvalid."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    remedy = 'write it as "nats://127.0.0.1:4222"'
    try:
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        raise ConfigInvalid(field="bus.url", value=url, remedy=remedy) from None
    if not host:
        raise ConfigInvalid(field="bus.url", value=url, remedy=remedy)
    return host, port


def broker_name(url: str) -> str:
    """``host:port``, for messages: the URL itself may hold credentials."""
    return "{}:{}".format(*broker_address(url))


async def wait_for_broker(url: str, *, timeout_s: float) -> None:
    """Return once the port accepts a connection; raises BusUnavailable with the last cause.

    nats-py sleeps two seconds after a refused first connect, and says nothing of the cause.
    """
    host, port = broker_address(url)
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    cause = ""
    while True:
        attempt_s = min(ATTEMPT_TIMEOUT_S, max(PAUSE_S, deadline_s - loop.time()))
        try:
            async with asyncio.timeout(attempt_s):
                _, writer = await asyncio.open_connection(host, port)
        except (TimeoutError, OSError) as error:
            if not cause:
                log.info("bus.waiting", extra={"broker": f"{host}:{port}", "cause": repr(error)})
            cause = str(error) or "no answer"
        else:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            return
        if loop.time() + PAUSE_S >= deadline_s:
            break
        await asyncio.sleep(PAUSE_S)
    raise BusUnavailable(
        f"no broker at {host}:{port} within {timeout_s:g} s ({cause}): start one with `oserve up` "
        "or `nats-server -js`, or set bus.url"
    )
