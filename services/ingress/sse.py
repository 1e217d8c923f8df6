"""A stream of server-sent events on an aiohttp connection.

The head, the frames of HTTP's chunked encoding and the end of the body are written here, straight
to the socket and from the callback that has something to say: going through aiohttp costs each of
them a turn of the event loop, and the first token waits for its turn.
"""

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol

from aiohttp import HttpVersion11, web

from services.ingress.journey import Journey

SSE_COMMENT = b": waiting\n\n"
_END = b"0\r\n\r\n"
_STATUS = b"HTTP/1.1 200 OK\r\n"
_FIXED = "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"


class SseResponse(web.StreamResponse):
    """A response that is sent already when its handler returns it."""

    def __init__(self, request: web.Request, headers: Callable[[], dict[str, str]]) -> None:
        super().__init__()
        self._headers_now = headers
        self._chunked_body = request.version >= HttpVersion11
        # Without chunks nothing but the connection's end tells a client of HTTP/1.0 the end.
        self._keep_open = self._chunked_body and request.keep_alive
        self._socket = request.transport
        self.begun = False

    @property
    def keep_alive(self) -> bool:
        return self._keep_open

    def send(self, event: bytes) -> None:
        """Write an event, the first one behind the head."""
        transport = self._socket
        if transport is None or transport.is_closing():
            return  # the handler is being cancelled
        if self._chunked_body:
            event = b"%x\r\n%b\r\n" % (len(event), event)
        if not self.begun:
            self.begun = True
            event = self._head() + event
        transport.write(event)

    def end(self) -> None:
        """Nothing more will be sent."""
        if self._chunked_body and self._socket is not None and not self._socket.is_closing():
            self._socket.write(_END)

    def abort(self) -> None:
        if self._socket is not None:
            self._socket.abort()

    def buffered(self) -> int:
        """Bytes that the client has not taken yet."""
        return self._socket.get_write_buffer_size() if self._socket is not None else 0

    def _head(self) -> bytes:
        lines = [f"{name}: {value}\r\n" for name, value in self._headers_now().items()]
        lines.append(f"Date: {formatdate(usegmt=True)}\r\n")
        lines.append(
            "Transfer-Encoding: chunked\r\n" if self._chunked_body else "Connection: close\r\n"
        )
        return _STATUS + (_FIXED + "".join(lines) + "\r\n").encode("latin-1")

    async def prepare(self, request: web.BaseRequest) -> None:
        """aiohttp would send a head here."""

    async def write_eof(self, data: bytes = b"") -> None:
        """aiohttp would end the body here."""


class Waiting(Protocol):
    """A stream with an end to wait for."""

    done: asyncio.Future[None]

    def write(self, event: bytes) -> None: ...


async def wait_with_comments(stream: Waiting, journeys: list[Journey], *, every_s: float) -> None:
    """Wait for the end, with a comment now and then: proxies close silent connections. None
    before a replica has the request: until then an error may still become a proper status."""
    while not stream.done.done():
        await asyncio.wait((stream.done,), timeout=every_s)
        accepted = any(journey.accepted_s is not None for journey in journeys)
        if accepted and not stream.done.done():
            stream.write(SSE_COMMENT)
    await stream.done
