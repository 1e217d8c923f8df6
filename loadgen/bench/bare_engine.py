"""The modelled engine with the thinnest HTTP server that a streaming client accepts.

What a request costs without the mesh: ``python -m loadgen.bench.bare_engine PORT ENGINES JSON``
serves completions like the ingress does, straight from engines in this process. It is the baseline
that the mesh's added latency is measured against, and not fit for anything else.
"""

import asyncio
import sys
from typing import Any, cast

import msgspec
import uvloop

from services.worker.engine.interface import EngineRequest
from services.worker.engine.modelled import ModelledEngine
from shared.mesh import ModelledEngineSettings
from shared.messages.requests import SamplingParams

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(body: bytes) -> bytes:
    data = b"data: " + body + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


class BareEngine:
    """One engine and its clock: a step's chunks are sent when the step would have ended."""

    def __init__(self, settings: ModelledEngineSettings) -> None:
        self.engine = ModelledEngine(settings, context_tokens_max=8192)
        self.clients: dict[str, Connection] = {}
        self._work = asyncio.Event()

    def add(self, request: EngineRequest, client: "Connection") -> None:
        self.clients[request.key] = client
        self.engine.add(request)
        self._work.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            if not self.engine.has_work:
                self._work.clear()
                await self._work.wait()
                due_s = loop.time()
            step = self.engine.step()
            due_s = max(due_s + step.duration_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            for chunk in step.chunks:
                client = self.clients[chunk.key]
                client.send(chunk.tokens, chunk.position)
                if chunk.finish is not None:
                    del self.clients[chunk.key]
                    client.finish(chunk.finish)


class Connection(asyncio.Protocol):
    """One client connection, one request at a time."""

    count = 0

    def __init__(self, engines: list[BareEngine]) -> None:
        self._engines = engines
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            self._buffer = body[length:]
            self._serve(msgspec.json.decode(body[:length]))

    def _serve(self, body: dict[str, Any]) -> None:
        Connection.count += 1
        sampling = SamplingParams(output_tokens_max=body["max_tokens"], temperature=0.0)
        request = EngineRequest(
            key=str(Connection.count), prompt_tokens=body["prompt"], sampling=sampling
        )
        self._tokens = 0
        self._engines[Connection.count % len(self._engines)].add(request, self)

    def send(self, tokens: list[int], position: int) -> None:
        assert self._transport is not None
        choice = {
            "index": 0, "text": bytes(tokens).decode(), "finish_reason": None,
            "token_ids": tokens, "position": position,
        }  # fmt: skip
        head = HEAD if self._tokens == 0 else b""
        self._tokens += len(tokens)
        self._transport.write(head + event(msgspec.json.encode({"choices": [choice]})))

    def finish(self, reason: str) -> None:
        assert self._transport is not None
        choice = {"index": 0, "text": "", "finish_reason": reason}
        usage = {"prompt_tokens": 0, "completion_tokens": self._tokens}
        self._transport.write(
            event(msgspec.json.encode({"choices": [choice]}))
            + event(msgspec.json.encode({"choices": [], "usage": usage}))
            + event(b"[DONE]")
            + b"0\r\n\r\n"
        )


async def main(port: int, count: int, settings: ModelledEngineSettings) -> None:
    engines = [BareEngine(settings) for _ in range(count)]
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Connection(engines), "127.0.0.1", port)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.gather(*(engine.run() for engine in engines))


if __name__ == "__main__":
    uvloop.run(
        main(
            int(sys.argv[1]),
            int(sys.argv[2]),
            msgspec.json.decode(sys.argv[3], type=ModelledEngineSettings),
        )
    )
