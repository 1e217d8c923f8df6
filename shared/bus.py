# pyright: reportUnknownMemberType=false
# (nats-py leaves parts of its signatures untyped)
"""The message bus: a small protocol, and NATS behind it. The only importer of nats.

Publishing is at most once. What must not be lost is either repeated by its owner (plans, reports,
commands) or detected by position (token chunks). State lives in one KV bucket by compare-and-set,
events in one bounded stream.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import nats
import nats.errors
import nats.js.errors
import nats.micro
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, KeyValueConfig, RetentionPolicy, StorageType, StreamConfig

from shared.errors import BusUnavailable, DeadlineExceeded, PayloadTooLarge
from shared.subjects import EVENTS

log = logging.getLogger("oserve.bus")

STATE_BUCKET = "OSERVE_STATE"
EVENT_STREAM = "OSERVE_EVENTS"


class BusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the broker, and how much it keeps."""

    url: str = "nats://127.0.0.1:4222"
    user: str = ""
    password: str = ""
    connect_timeout_s: float = 30.0  # how long a service waits for a broker at start
    reconnect_wait_s: float = 0.1
    pending_bytes_max: int = 16 << 20  # kept while the broker is away; beyond, publish fails
    journal_bytes_max: int = 128 << 20
    journal_age_s_max: float = 24 * 3600.0
    state_timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived."""

    subject: str
    payload: bytes
    reply_to: str = ""
    headers: Mapping[str, str] | None = None


Handler = Callable[[Delivery], None]


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...


class Bus(Protocol):
    """What services may ask of a broker. Handlers are called on the event loop and must not
    block; they only enqueue."""

    @property
    def connected(self) -> bool: ...

    @property
    def payload_bytes_max(self) -> int: ...

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply_to: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Raises PayloadTooLarge, or BusUnavailable when the reconnect buffer is full."""
        ...

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = ""
    ) -> Subscription: ...

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Raises DeadlineExceeded, BusUnavailable."""
        ...

    async def load(self, key: str) -> tuple[bytes | None, int]:
        """Value and revision of a key of the state bucket; (None, revision) if it holds nothing.
        Raises BusUnavailable."""
        ...

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        """Write iff the key's revision is still ``revision``; the new revision, or None if
        somebody else wrote first. Raises BusUnavailable."""
        ...

    async def register(
        self, *, name: str, version: str, description: str, metadata: dict[str, str]
    ) -> None:
        """Join the broker's service discovery under ``name``."""
        ...

    async def close(self) -> None:
        """Flush what is published, then leave. Idempotent."""
        ...


class NatsBus:
    """Bus on a NATS server with JetStream."""

    def __init__(self, config: BusConfig) -> None:
        self._config = config
        self._client = Client()
        self._state: Any = None
        self._errors_seen = 0

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def payload_bytes_max(self) -> int:
        return self._client.max_payload

    @property
    def client(self) -> Client:
        """The NATS client, for this module's tools below."""
        return self._client

    async def connect(self, *, name: str) -> None:
        """Connect and make sure that bucket and stream exist. Raises BusUnavailable with the
        cause once ``connect_timeout_s`` is over."""
        config = self._config
        await _wait_for_port(config.url, config.connect_timeout_s)
        try:
            await self._client.connect(
                config.url,
                name=name,
                user=config.user or None,
                password=config.password or None,
                max_reconnect_attempts=-1,
                reconnect_time_wait=config.reconnect_wait_s,  # type: ignore[arg-type]  # float works
                pending_size=config.pending_bytes_max,
                ping_interval=10,
                max_outstanding_pings=3,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
            )
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"broker at {config.url} refused us: {error}") from error
        await self._ensure_storage()

    async def _ensure_storage(self) -> None:
        config = self._config
        jetstream = self._client.jetstream(timeout=config.connect_timeout_s)
        stream = StreamConfig(
            name=EVENT_STREAM,
            subjects=[EVENTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_bytes=config.journal_bytes_max,
            max_age=config.journal_age_s_max,
        )
        bucket = KeyValueConfig(
            bucket=STATE_BUCKET, history=8, max_bytes=8 << 20, storage=StorageType.FILE
        )
        try:
            try:
                await jetstream.add_stream(stream)
            except nats.js.errors.BadRequestError:  # exists with other limits: ours win
                await jetstream.update_stream(stream)
            self._state = await jetstream.create_key_value(bucket)
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(
                f"JetStream at {config.url} cannot keep our state and events: {error!r}; "
                "start nats-server with JetStream enabled (-js) and a writable store"
            ) from error
        self._jetstream = self._client.jetstream(timeout=config.state_timeout_s)
        self._state = await self._jetstream.key_value(STATE_BUCKET)

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply_to: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        try:
            await self._client.publish(subject, payload, reply_to, headers)
        except nats.errors.MaxPayloadError:
            raise PayloadTooLarge(
                subject=subject, size_bytes=len(payload), limit_bytes=self._client.max_payload
            ) from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish on {subject}: {error}") from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        async def on_message(message: Msg) -> None:
            handler(Delivery(message.subject, message.data, message.reply, message.headers))

        return await self._client.subscribe(subject, queue=queue, cb=on_message)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        try:
            answer = await self._client.request(subject, payload, timeout=timeout_s)
        except (TimeoutError, nats.errors.TimeoutError):
            raise DeadlineExceeded(f"no answer on {subject} within {timeout_s} s") from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"nobody answers {subject}: {error}") from error
        return answer.data

    async def load(self, key: str) -> tuple[bytes | None, int]:
        try:
            entry = await self._state.get(key)
        except nats.js.errors.KeyDeletedError as error:
            return None, error.entry.revision if error.entry else 0  # type: ignore[union-attr]
        except nats.js.errors.KeyNotFoundError:
            return None, 0
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(f"cannot read state {key}: {error!r}") from error
        return entry.value, entry.revision

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        try:
            return await self._state.update(key, value, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            return None
        except (TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable(f"cannot write state {key}: {error!r}") from error

    async def register(
        self, *, name: str, version: str, description: str, metadata: dict[str, str]
    ) -> None:
        await nats.micro.add_service(
            self._client, name=name, version=version, description=description, metadata=metadata
        )

    async def services(self, *, wait_s: float = 0.3) -> list[dict[str, Any]]:
        """INFO of every registered service that answers within ``wait_s``."""
        found: list[dict[str, Any]] = []
        inbox = self._client.new_inbox()

        def on_info(delivery: Delivery) -> None:
            found.append(msgspec.json.decode(delivery.payload))

        subscription = await self.subscribe(inbox, on_info)
        await self.publish("$SRV.INFO", b"", reply_to=inbox)
        await asyncio.sleep(wait_s)
        await subscription.unsubscribe()
        return found

    async def close(self) -> None:
        if self._client.is_closed:
            return
        try:
            await asyncio.wait_for(self._client.drain(), timeout=self._config.state_timeout_s)
        except (TimeoutError, nats.errors.Error):
            await self._client.close()

    async def _on_error(self, error: Exception) -> None:
        self._errors_seen += 1
        log.warning("bus.error", extra={"error": repr(error), "seen": self._errors_seen})

    async def _on_disconnect(self) -> None:
        log.warning("bus.disconnected", extra={"url": self._config.url})

    async def _on_reconnect(self) -> None:
        log.info("bus.reconnected", extra={"url": self._config.url})


async def _wait_for_port(url: str, timeout_s: float) -> None:
    """nats-py sleeps two seconds after a refused first connect, so probe the port before."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    host, port = parts.hostname or "127.0.0.1", parts.port or 4222
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    cause = "no attempt made"
    while loop.time() < deadline_s:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2.0)
        except (TimeoutError, OSError) as error:
            if cause == "no attempt made":
                log.info("bus.waiting", extra={"url": url, "cause": repr(error)})
            cause = str(error) or repr(error)
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise BusUnavailable(
        f"no broker at {host}:{port} within {timeout_s:g} s ({cause}): start one with `oserve up` "
        "or `nats-server -js`, or set bus.url"
    )
