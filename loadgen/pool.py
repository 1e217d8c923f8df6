"""Where the server is, and the connections to it that are kept alive, up to a bound."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

from loadgen import results
from loadgen.results import RequestResult
from loadgen.wire import Connection, Exchange, Lost
from shared.errors import ConfigInvalid

_CONNECTS_MAX = 64
"""Connections being opened at once: more overflow a server's accept queue, and each that does
waits a second for TCP to try again."""


class Request(Exchange, Protocol):
    """An exchange with a result to note resends in, and a place for its connection."""

    connection: Connection | None

    @property
    def result(self) -> RequestResult: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server's address; ``path`` is what its URL has before /v1."""

    host: str
    port: int
    tls: bool
    path: str
    authority: str

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """The request line and headers, still open for more."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not all(line.isascii() and line.isprintable() for line in lines):
            remedy = "use printable ASCII without line breaks in the URL and the API key"
            raise ConfigInvalid(field="headers", value="...", remedy=remedy)
        return ("\r\n".join(lines) + "\r\n").encode("ascii")


def parse_url(url: str) -> Target:
    """The target of an http(s) URL; a trailing ``/v1`` is taken off, as clients often have it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigInvalid(field="url", value=url, remedy=str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigInvalid(field="url", value=url, remedy="write it like http://127.0.0.1:8000")
    tls = parts.scheme == "https"
    return Target(
        host=parts.hostname,
        port=port or (443 if tls else 80),
        tls=tls,
        path=parts.path.rstrip("/").removesuffix("/v1"),
        authority=parts.netloc.rpartition("@")[2],
    )


class ConnectionPool:
    """Gives each request a connection of its own: an idle one, else a new one, else none."""

    def __init__(
        self,
        target: Target,
        tasks: asyncio.TaskGroup,
        *,
        connections_max: int,
        connect_timeout_s: float,
    ) -> None:
        self._target, self._tasks = target, tasks
        self._connections_max, self._connect_timeout_s = connections_max, connect_timeout_s
        self._tls = ssl.create_default_context() if target.tls else None
        self._idle: list[Connection] = []  # last in, first out, so that few are kept warm
        self._open: set[Connection] = set()
        self._opening: dict[Request, asyncio.Task[None]] = {}
        self._connects = asyncio.Semaphore(_CONNECTS_MAX)

    def submit(self, request: Request, payload: bytes) -> None:
        """Send ``payload``; the answer, or why there is none, goes to ``request``."""
        connection = self._idle_connection()
        if connection is not None:
            self._send(connection, request, payload)
        elif len(self._open) + len(self._opening) >= self._connections_max:
            detail = f"all {self._connections_max} connections were in use here"
            request.lost(results.NOT_SENT, detail)
        else:
            self._open_for(request, payload, fresh=False)

    def cancel(self, request: Request) -> None:
        """Give up on a request: it is told nothing more, and its connection is closed."""
        opening = self._opening.pop(request, None)
        if opening is not None:
            opening.cancel()
        connection, request.connection = request.connection, None
        if connection is not None:
            connection.abort()

    def close(self) -> None:
        for task in self._opening.values():
            task.cancel()
        for connection in list(self._open):
            connection.abort()

    def _idle_connection(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def _open_for(self, request: Request, payload: bytes, *, fresh: bool) -> None:
        task = self._tasks.create_task(self._connect(request, payload, fresh=fresh))
        self._opening[request] = task

    def _send(self, connection: Connection, request: Request, payload: bytes) -> None:
        request.connection = connection
        connection.send(request, payload)

    async def _connect(self, request: Request, payload: bytes, *, fresh: bool) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s), self._connects:
                # While we waited for our turn another request may have ended.
                connection = None if fresh else self._idle_connection()
                if connection is None:
                    _, connection = await asyncio.get_running_loop().create_connection(
                        self._connection, self._target.host, self._target.port, ssl=self._tls
                    )
                    self._open.add(connection)
        except TimeoutError:
            detail = f"no connection within {self._connect_timeout_s:g} s"
            self._fail(request, detail)
        except OSError as error:
            self._fail(request, str(error))
        else:
            if connection.usable:
                del self._opening[request]
                self._send(connection, request, payload)
            else:
                self._open.discard(connection)
                self._fail(request, "the server closed the connection at once")

    def _fail(self, request: Request, detail: str) -> None:
        del self._opening[request]
        request.lost(results.CONNECT_FAILED, detail)

    def _connection(self) -> Connection:
        return Connection(on_free=self._idle.append, on_closed=self._gone)

    def _gone(self, connection: Connection, lost: Lost | None) -> None:
        """A server may close a kept connection just as we use it. A request that got not one byte
        on such a connection is sent again, once, on a new one; any other is lost."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if lost is None:
            return
        request = cast("Request", lost.exchange)  # this pool sends nothing else
        request.connection = None
        if lost.unread and request.result.resends == 0:
            request.result.resends = 1
            self._open_for(request, lost.payload, fresh=True)
        else:
            request.lost(results.CONNECTION_LOST, lost.detail)
