"""A stream of server-sent events on an aiohttp connection."""

import asyncio

from aiohttp import HttpVersion11, web

from services.ingress.exchange import Streamed

SSE_COMMENT = b": waiting\n\n"


async def open_stream(
    request: web.Request, stream: Streamed, headers: dict[str, str]
) -> web.StreamResponse:
    """Send the head and what the stream has kept; from then on its events go straight to the
    socket. Raises ConnectionError when the client is gone."""
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    response.headers["Cache-Control"] = "no-cache"
    chunked = request.version >= HttpVersion11
    if chunked:
        response.enable_chunked_encoding()
    else:
        response.force_close()  # else nothing tells a keep-alive client of HTTP/1.0 the end
    await response.prepare(request)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    # aiohttp keeps the headers back until the first write; after it the socket is ours.
    await response.write(stream.kept() or SSE_COMMENT)

    def send(event: bytes) -> None:
        transport.write(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)

    stream.opened(send, transport.get_write_buffer_size)
    return response


async def wait_with_comments(stream: Streamed, *, every_s: float) -> None:
    """Wait for the end, with a comment now and then: proxies close silent connections."""
    while not stream.done.done():
        await asyncio.wait((stream.done,), timeout=every_s)
        if not stream.done.done():
            stream.write(SSE_COMMENT)
    await stream.done
