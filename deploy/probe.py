"""Asks a mesh whether it can serve, over plain HTTP."""

import asyncio
import json
from typing import Any

_TIMEOUT_S = 2.0
_ANSWER_BYTES_MAX = 1 << 16
_OK = 200
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # only compared


async def not_ready(host: str, port: int) -> str:
    """Why ``/ready`` does not say 200; "" when it does."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            status, body = await _get(_ANYWHERE.get(host, host), port, "/ready")
    except TimeoutError:
        return f"/ready does not answer within {_TIMEOUT_S} s"
    except (OSError, ValueError) as error:
        return f"the ingress does not answer yet: {error}"
    return "" if status == _OK else _cause(body)


async def _get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """HTTP/1.0, so that the end of the answer is the end of the connection."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        answer = await reader.read(_ANSWER_BYTES_MAX)
        while more := await reader.read(_ANSWER_BYTES_MAX):
            answer += more
            if len(answer) > _ANSWER_BYTES_MAX:
                break
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    if len(words) < 2:  # noqa: PLR2004  # version and status
        raise ValueError("no HTTP answer")
    return int(words[1]), body


def _cause(body: bytes) -> str:
    try:
        answer: dict[str, Any] = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    return str(answer.get("cause", answer))
