"""A small OpenAI-like server whose faults a test chooses by ``max_tokens``: a peer, not a mock."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

REFUSE, DROP, SLOW, SHORT, TWICE, NO_DONE, GAP, STREAM_ERROR, GARBAGE, NO_IDS, SILENT = range(
    901, 912
)


class FakeServer:
    """Streams ``max_tokens`` tokens, one event each, unless the number is one of the above."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[object] = set()
        self.slow = asyncio.Event()  # set: slow requests may end

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport)
        kind = body["max_tokens"]
        if kind == REFUSE:
            error = {"message": "no room", "type": "service_unavailable", "code": "overloaded"}
            return web.json_response({"error": error}, status=503)
        if kind == SLOW:
            await self.slow.wait()
        if kind == SILENT:
            await asyncio.sleep(30)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "x-request-id": f"req-{len(self.bodies)}",
                "x-oserve-replica": "replica-1",
                "x-oserve-overhead-ms": "1.5",
            }
        )
        await response.prepare(request)
        await self._stream(request, response, kind, body)
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, kind: int, body: dict[str, Any]
    ) -> None:
        count = kind if kind < REFUSE else 3
        for position in range(count):
            if kind == DROP and position == 2:
                assert request.transport is not None
                request.transport.abort()
                return
            if kind == STREAM_ERROR and position == 2:
                await response.write(
                    b'data: {"error":{"message":"lost","type":"x","code":"e"}}\n\n'
                )
                return
            if kind == GARBAGE and position == 1:
                await response.write(b"data: {nonsense\n\n")
            token: dict[str, Any] = {"index": 0, "text": "ab", "finish_reason": None}
            if kind != NO_IDS:
                shown = position + 1 if kind == GAP and position == 2 else position
                token |= {"token_ids": [position], "position": shown}
            if position == count - 1:
                token["finish_reason"] = "length"
            await self._event(response, {"choices": [token], "usage": None})
            await response.write(b": keep-alive\n\n")
        if kind == TWICE:
            end = {"index": 0, "text": "", "finish_reason": "length"}
            await self._event(response, {"choices": [end]})
        told = kind if kind in (DROP, TWICE, NO_DONE, GAP, GARBAGE, NO_IDS) else count
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": told}
        await self._event(response, {"choices": [], "usage": usage})
        if kind != NO_DONE:
            await response.write(b"data: [DONE]\n\n")

    @staticmethod
    async def _event(response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def models(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})


@asynccontextmanager
async def fake_server() -> AsyncGenerator[FakeServer]:
    """The server, on a free port of this machine."""
    server = FakeServer()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_get("/v1/models", server.models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        server.slow.set()
        await runner.cleanup()
