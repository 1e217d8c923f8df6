"""Asks a server what it serves, before anything is measured."""

import asyncio

import msgspec

from loadgen.pool import Target, parse_url
from loadgen.wire import Connection, Lost
from shared.errors import OServeError

_BODY_BYTES_MAX = 1024 * 1024
_HTTP_OK = 200


class ServerUnreachable(OServeError):
    """No server answers at the URL, or it answers something else."""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def served_models(url: str, *, api_key: str = "", timeout_s: float = 10.0) -> list[str]:
    """The ids of ``GET /v1/models``; raises ServerUnreachable."""
    target = parse_url(url)
    headers = {"Accept": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    payload = target.head("GET", "/v1/models", headers) + b"\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            status, body = await _fetch(target, payload)
    except TimeoutError:
        raise ServerUnreachable(f"{url} gave no answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ServerUnreachable(
            f"{url} cannot be reached ({error}); is the mesh up, and the port right?"
        ) from None
    if status != _HTTP_OK:
        shown = body[:200].decode("utf-8", "replace")
        raise ServerUnreachable(f"{url}/v1/models answered {status}: {shown}")
    try:
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except msgspec.DecodeError as error:
        raise ServerUnreachable(f"{url}/v1/models is not OpenAI's list: {error}") from None


async def _fetch(target: Target, payload: bytes) -> tuple[int, bytes]:
    loop = asyncio.get_running_loop()
    answer = _Answer(loop.create_future())

    def closed(_: Connection, lost: Lost | None) -> None:
        if lost is not None:
            answer.lost("", lost.detail)

    _, connection = await loop.create_connection(
        lambda: Connection(on_free=lambda _: None, on_closed=closed),
        target.host,
        target.port,
        ssl=target.tls or None,
    )
    try:
        connection.send(answer, payload)
        return await answer.whole
    finally:
        connection.abort()


class _Answer:
    """Collects a whole answer."""

    def __init__(self, whole: "asyncio.Future[tuple[int, bytes]]") -> None:
        self.whole = whole
        self._status = 0
        self._body = b""

    def began(self, status: int, headers: dict[bytes, bytes]) -> None:
        del headers
        self._status = status

    def received(self, data: bytes, now_s: float) -> None:
        del now_s
        if len(self._body) < _BODY_BYTES_MAX:
            self._body += data

    def ended(self, now_s: float) -> None:
        del now_s
        if not self.whole.done():
            self.whole.set_result((self._status, self._body))

    def lost(self, code: str, detail: str) -> None:
        del code
        if not self.whole.done():
            self.whole.set_exception(ConnectionError(detail))
