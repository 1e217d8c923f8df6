"""HTTP/1.1 as a client of answers that stream: a protocol that parses by hand.

The load generator shares the machine with what it measures, so an answer's chunk costs one
``find``, one slice and one callback. One request at a time on a connection; no pipelining.
"""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic  # not the loop's clock: uvloop's counts whole milliseconds
from typing import Protocol, cast

from loadgen.results import BAD_ANSWER

HEAD_BYTES_MAX = 64 * 1024
CHUNK_BYTES_MAX = 16 * 1024 * 1024
_CHUNK_LINE_BYTES_MAX = 1024


class Exchange(Protocol):
    """Who is told about one answer. After ``ended`` or ``lost`` nothing more is told."""

    def began(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def received(self, data: bytes, now_s: float) -> None: ...
    def ended(self, now_s: float) -> None: ...
    def lost(self, code: str, detail: str) -> None: ...


class BadAnswer(Exception):
    """The peer does not speak HTTP/1.1, or beyond our bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A request whose connection closed before its answer's end. ``unread``: the connection had
    served before and gave no byte this time, so the server most likely closed it for idleness."""

    exchange: Exchange
    payload: bytes
    unread: bool
    detail: str


class Connection(asyncio.Protocol):
    """One TCP connection. ``on_free`` is called when it can take another request, ``on_closed``
    when it is gone, with the request it leaves behind."""

    __slots__ = (
        "_answered",
        "_chunked",
        "_exchange",
        "_in_body",
        "_keep_alive",
        "_left",
        "_on_closed",
        "_on_free",
        "_payload",
        "_pending",
        "_reused",
        "_transport",
    )

    def __init__(
        self,
        *,
        on_free: Callable[["Connection"], None],
        on_closed: Callable[["Connection", Lost | None], None],
    ) -> None:
        self._on_free, self._on_closed = on_free, on_closed
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._payload = b""
        self._reused = False
        self._reset()

    def _reset(self) -> None:
        self._pending = b""
        self._in_body = self._chunked = self._answered = False
        self._keep_alive = True
        self._left: int | None = None  # body bytes to come; None: chunked, or until it closes

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange, payload: bytes) -> None:
        assert self._exchange is None
        assert self._transport is not None
        self._reset()
        self._exchange, self._payload = exchange, payload
        self._transport.write(payload)

    def abort(self) -> None:
        """Close at once, without telling the exchange."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        raw = cast("socket.socket | None", transport.get_extra_info("socket"))
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._transport = None
        lost = None
        if exchange is not None:
            lost = Lost(
                exchange=exchange,
                payload=self._payload,
                unread=self._reused and not self._answered,
                detail=str(exc) if exc else "the server closed the connection",
            )
        self._on_closed(self, lost)

    def eof_received(self) -> bool | None:
        if self._in_body and not self._chunked and self._left is None:
            self._keep_alive = False
            self._finish(monotonic())
        return None

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # bytes nobody asked for: this connection is out of step
            self.abort()
            return
        self._answered = True
        if self._pending:
            data = self._pending + data
            self._pending = b""
        try:
            self._parse(data, monotonic())
        except BadAnswer as error:
            exchange = self._exchange
            self.abort()
            exchange.lost(BAD_ANSWER, str(error))

    def _parse(self, data: bytes, now_s: float) -> None:
        at = 0
        while not self._in_body:
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                if len(data) - at > HEAD_BYTES_MAX:
                    raise BadAnswer(f"the answer's head exceeds {HEAD_BYTES_MAX} bytes")
                self._pending = data[at:]
                return
            self._read_head(data[at:end])
            at = end + 4
        if self._chunked:
            self._read_chunks(data, at, now_s)
        elif self._left is None:
            self._deliver(data[at:], now_s)
        else:
            body = data[at : at + self._left]
            self._left -= len(body)
            self._deliver(body, now_s)
            if self._left == 0:
                self._finish(now_s)

    def _read_head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        version, _, rest = lines[0].partition(b" ")
        status_text = rest[:3]
        if not version.startswith(b"HTTP/1.") or not status_text.isdigit():
            raise BadAnswer(f"not an HTTP/1.1 answer: {lines[0][:80]!r}")
        status = int(status_text)
        if status < 200:  # noqa: PLR2004  # 1xx: the answer proper follows
            return
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        length = headers.get(b"content-length")
        if not self._chunked and length is not None:
            if not length.isdigit():
                raise BadAnswer(f"content-length is {length[:40]!r}")
            self._left = int(length)
        closes = headers.get(b"connection", b"").lower() == b"close"
        self._keep_alive = not closes and version == b"HTTP/1.1"
        self._in_body = True
        if self._exchange is not None:
            self._exchange.began(status, headers)

    def _read_chunks(self, data: bytes, at: int, now_s: float) -> None:
        while self._exchange is not None:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                if len(data) - at > _CHUNK_LINE_BYTES_MAX:
                    raise BadAnswer("a chunk's size line does not end")
                self._pending = data[at:]
                return
            size = _chunk_size(data[at:line_end])
            begin = line_end + 2
            if size == 0:
                self._read_trailers(data, at, begin, now_s)
                return
            end = begin + size
            if len(data) < end + 2:
                self._pending = data[at:]
                return
            self._deliver(data[begin:end], now_s)
            at = end + 2

    def _read_trailers(self, data: bytes, at: int, begin: int, now_s: float) -> None:
        ended = data.startswith(b"\r\n", begin) or data.find(b"\r\n\r\n", begin) >= 0
        if ended:
            self._finish(now_s)
        elif len(data) - at > HEAD_BYTES_MAX:
            raise BadAnswer("the trailers do not end")
        else:
            self._pending = data[at:]

    def _deliver(self, data: bytes, now_s: float) -> None:
        if self._exchange is not None and data:
            self._exchange.received(data, now_s)

    def _finish(self, now_s: float) -> None:
        exchange, self._exchange = self._exchange, None
        if self._keep_alive and self.usable:
            self._reused = True
            self._payload = b""
            self._on_free(self)
        elif self._transport is not None:
            self._transport.close()
        if exchange is not None:
            exchange.ended(now_s)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        size = int(digits, 16)
    except ValueError:
        size = -1
    if not 0 <= size <= CHUNK_BYTES_MAX:
        raise BadAnswer(f"a chunk's size line is {line[:40]!r}")
    return size
