# pyright: reportUnknownMemberType=false
# (nats-py leaves parts of its signatures untyped)
"""The message bus: a small protocol, and NATS behind it. Only bus_storage imports nats too.

Publishing is at most once. What must not be lost is either repeated by its owner (plans, reports,
commands) or detected by position (token chunks).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import nats
import nats.errors
import nats.micro
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from shared.bus_storage import Kept, Storage, open_storage
from shared.errors import BusUnavailable, DeadlineExceeded, PayloadTooLarge
from shared.probe import broker_name, wait_for_broker

log = logging.getLogger("oserve.bus")


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

    async def history(self, subject: str, *, limit: int, since_s: float = 0.0) -> list[Kept]:
        """The newest ``limit`` events on ``subject`` (wildcards allowed) that the journal took at
        ``since_s`` (unix seconds) or later and still has, the oldest first; HISTORY_MAX at most.
        Raises BusUnavailable."""
        ...

    async def register(
        self, *, name: str, version: str, description: str, metadata: dict[str, str]
    ) -> None:
        """Join the broker's service discovery."""
        ...

    async def close(self) -> None:
        """Flush what is published, then leave. Idempotent."""
        ...


class _NatsSubscription:
    def __init__(self, inner: NatsSubscription) -> None:
        self._inner = inner

    async def unsubscribe(self) -> None:
        """Idempotent; a connection that closed has unsubscribed already."""
        with suppress(nats.errors.Error):
            await self._inner.unsubscribe()


class NatsBus:
    """Bus on a NATS server with JetStream."""

    def __init__(self, config: BusConfig) -> None:
        self._config = config
        self._client = Client()
        self._storage: Storage  # from connect on
        self._error_told = ""
        self._connecting = self._opened = False  # nats-py cannot close what was never opened

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def payload_bytes_max(self) -> int:
        return self._client.max_payload

    @property
    def client(self) -> Client:
        return self._client

    async def connect(self, *, name: str) -> None:
        """Connect; bucket and stream exist afterwards. Raises BusUnavailable with the cause."""
        config, where = self._config, broker_name(self._config.url)
        await wait_for_broker(config.url, timeout_s=config.connect_timeout_s)
        self._connecting = self._opened = True
        try:
            async with asyncio.timeout(config.connect_timeout_s):
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
        except (TimeoutError, nats.errors.Error, OSError) as error:
            await self._leave()
            raise BusUnavailable(
                f"broker at {where} refused us: {error!r}; check bus.url, bus.user and bus.password"
            ) from error
        finally:
            self._connecting = False
        try:
            self._storage = await open_storage(
                self._client,
                create_timeout_s=config.connect_timeout_s,
                use_timeout_s=config.state_timeout_s,
                journal_bytes_max=config.journal_bytes_max,
                journal_age_s_max=config.journal_age_s_max,
            )
        except (TimeoutError, nats.errors.Error) as error:
            await self._leave()
            raise BusUnavailable(
                f"JetStream at {where} cannot keep our state and events: {error!r}; "
                "start nats-server with JetStream enabled (-js) and a writable store"
            ) from error

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply_to: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        if headers:  # the broker counts them too, and hangs up on who exceeds its cap
            size_bytes = len(payload) + sum(len(k) + len(v) + 4 for k, v in headers.items()) + 12
            if size_bytes > self._client.max_payload:
                raise self._too_large(subject, size_bytes)
        try:
            await self._client.publish(subject, payload, reply_to, headers)
        except nats.errors.MaxPayloadError:
            raise self._too_large(subject, len(payload)) from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish on {subject}: {error!r}") from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        async def on_message(message: Msg) -> None:
            handler(Delivery(message.subject, message.data, message.reply, message.headers))

        try:
            inner = await self._client.subscribe(subject, queue=queue, cb=on_message)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe to {subject}: {error!r}") from error
        return _NatsSubscription(inner)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        try:
            answer = await self._client.request(subject, payload, timeout=timeout_s)
        except (TimeoutError, nats.errors.TimeoutError):
            raise DeadlineExceeded(f"no answer on {subject} within {timeout_s} s") from None
        except nats.errors.MaxPayloadError:
            raise self._too_large(subject, len(payload)) from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"nobody answers {subject}: {error!r}") from error
        return answer.data

    async def load(self, key: str) -> tuple[bytes | None, int]:
        return await self._storage.load(key)

    async def store(self, key: str, value: bytes, *, revision: int) -> int | None:
        return await self._storage.store(key, value, revision=revision)

    async def history(self, subject: str, *, limit: int, since_s: float = 0.0) -> list[Kept]:
        return await self._storage.history(subject, limit=limit, since_s=since_s)

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
        subscription = await self.subscribe(
            inbox, lambda delivery: found.append(msgspec.json.decode(delivery.payload))
        )
        await self.publish("$SRV.INFO", b"", reply_to=inbox)
        await asyncio.sleep(wait_s)
        await subscription.unsubscribe()
        return found

    async def close(self) -> None:
        if not self._opened or self._client.is_closed:
            return
        if self._client.is_connected:
            with suppress(TimeoutError, nats.errors.Error):
                async with asyncio.timeout(self._config.state_timeout_s):
                    await self._client.drain()
        await self._leave()

    async def _leave(self) -> None:
        # nats-py still writes to a dead connection, which uvloop calls a RuntimeError.
        with suppress(OSError, RuntimeError, nats.errors.Error):
            await self._client.close()

    def _too_large(self, subject: str, size_bytes: int) -> PayloadTooLarge:
        return PayloadTooLarge(
            subject=subject, size_bytes=size_bytes, limit_bytes=self._client.max_payload
        )

    async def _on_error(self, error: Exception) -> None:
        if self._connecting:  # without this nats-py tries a wrong password for ever
            raise error
        if self._client.is_connected or repr(error) != self._error_told:  # not at each attempt
            self._error_told = repr(error)
            log.warning("bus.error", extra={"error": self._error_told})

    async def _on_disconnect(self) -> None:
        if not self._client.is_closed:  # otherwise it is we who leave
            log.warning("bus.disconnected", extra={"broker": broker_name(self._config.url)})

    async def _on_reconnect(self) -> None:
        log.info("bus.reconnected", extra={"broker": broker_name(self._config.url)})
