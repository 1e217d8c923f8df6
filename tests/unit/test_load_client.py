"""The load client against a real HTTP server that misbehaves on request."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from loadgen import results
from loadgen.client import ClientOptions, Progress, closed_loop, replay
from loadgen.probe import ServerUnreachable, served_models
from loadgen.results import RequestResult
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid
from tests.unit import fake_openai
from tests.unit.fake_openai import FakeServer, fake_server

T = TypeVar("T")


def serve(test: Callable[[FakeServer], Awaitable[T]]) -> T:
    """Run ``test`` against a fake server of its own."""

    async def main() -> T:
        async with fake_server() as server:
            return await test(server)

    return asyncio.run(main())


def record(output_tokens: int, *, at_s: float = 0.0, **more: str) -> TraceRecord:
    return TraceRecord(
        timestamp_s=at_s,
        input_tokens=20,
        output_tokens=output_tokens,
        **more,  # pyright: ignore[reportArgumentType]  # texts only
    )


def options(server: FakeServer, **more: float | bool | str) -> ClientOptions:
    return ClientOptions(url=server.url, model="fake", **more)  # pyright: ignore[reportArgumentType]  # its own fields


def one(kind: int, **more: float | bool | str) -> RequestResult:
    """The result of one request of this kind."""
    (result,) = serve(lambda server: replay([record(kind)], options(server, **more)))
    return result


def test_a_completed_request_is_measured_whole() -> None:
    """Latencies, lengths and identities of good requests would be missing from reports."""
    result = one(5, keep_tokens=True)
    assert result.error_code == results.OK, result.error_message
    assert result.completed
    assert (result.status, result.output_tokens, result.token_ids) == (200, 5, [0, 1, 2, 3, 4])
    assert (result.finishes, result.dones, result.finish_reason) == (1, 1, "length")
    assert (result.usage_input_tokens, result.usage_output_tokens) == (20, 5)
    assert (result.request_id, result.replica_id, result.overhead_ms) == ("req-1", "replica-1", 1.5)
    assert result.ttft_s is not None
    assert result.e2e_s is not None
    assert 0 < result.ttft_s <= result.e2e_s
    assert list(result.chunk_tokens) == [1] * 5
    assert list(result.chunk_times_s) == sorted(result.chunk_times_s)


def test_the_request_asks_for_what_the_trace_says() -> None:
    """A replay would generate other lengths than the trace, or sample differently each time."""

    async def test(server: FakeServer) -> None:
        wanted = options(server, api_key="secret", seed=4)
        await replay([record(3, tenant="t", slo_class="batch"), record(3)], wanted)
        await replay([record(3, tenant="t", slo_class="batch")], wanted)
        first, second, again = server.bodies
        assert first["max_tokens"] == 3
        assert first["ignore_eos"] is first["stream"] is first["return_token_ids"] is True
        assert first["stream_options"] == {"include_usage": True}
        assert (first["user"], first["temperature"], len(first["prompt"])) == ("t", 0.0, 20)
        assert first == again
        assert first["prompt"] != second["prompt"]
        assert first["seed"] != second["seed"]
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert server.headers[0]["x-oserve-slo-class"] == "batch"
        assert "x-oserve-slo-class" not in server.headers[1]

    serve(test)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (fake_openai.REFUSE, "overloaded"),
        (fake_openai.DROP, results.CONNECTION_LOST),
        (fake_openai.SHORT, results.WRONG_LENGTH),
        (fake_openai.TWICE, results.ENDED_TWICE),
        (fake_openai.NO_DONE, results.UNFINISHED),
        (fake_openai.GAP, results.TOKENS_NOT_CONTIGUOUS),
        (fake_openai.STREAM_ERROR, "e"),
        (fake_openai.GARBAGE, results.BAD_ANSWER),
    ],
)
def test_each_way_to_fail_has_its_code(kind: int, code: str) -> None:
    """A lost or repeated token would be reported as a completed request."""
    result = one(kind)
    assert result.error_code == code, result.error_message
    assert not result.completed
    assert result.ended_s is not None


def test_a_server_without_token_ids_is_counted_by_its_usage() -> None:
    """Other OpenAI servers, which the mesh is compared with, would seem to fail every request."""
    result = one(fake_openai.NO_IDS)
    assert result.error_code == results.OK, result.error_message
    assert result.output_tokens == fake_openai.NO_IDS


def test_a_silent_server_times_out() -> None:
    """A hung replica would hang the replay for ever."""
    result = one(fake_openai.SILENT, timeout_s=0.2)
    assert result.error_code == results.TIMED_OUT


def test_an_unreachable_server_is_an_error_of_each_request() -> None:
    """A server that dies during a replay would end it without a report."""

    async def main() -> list[RequestResult]:
        gone = ClientOptions(url="http://127.0.0.1:9", model="fake")
        return await replay([record(3), record(3)], gone)

    assert [one.error_code for one in asyncio.run(main())] == [results.CONNECT_FAILED] * 2


def test_arrivals_do_not_wait_for_answers() -> None:
    """An overloaded server would slow its own load down, and look well."""

    async def test(server: FakeServer) -> None:
        count = 30
        slow = [record(fake_openai.SLOW, at_s=0.002 * place) for place in range(count)]
        running = asyncio.ensure_future(replay(slow, options(server)))
        while len(server.bodies) < count:  # every arrival gets there while none has an answer
            await asyncio.sleep(0.005)
        assert not running.done()
        server.slow.set()
        seen = await running
        assert [one.index for one in seen] == list(range(count))
        assert all(one.sent_s is not None for one in seen)
        sent = [one.sent_s or 0.0 for one in seen]
        assert sent == sorted(sent)

    serve(test)


def test_beyond_connections_max_is_refused_here_and_counted() -> None:
    """The client's own limit would be mistaken for the server's."""

    async def test(server: FakeServer) -> None:
        slow = [record(fake_openai.SLOW) for _ in range(5)]
        progress = Progress()
        running = asyncio.ensure_future(
            replay(slow, options(server, connections_max=3), progress=progress)
        )
        while len(server.bodies) < 3:
            await asyncio.sleep(0.005)
        server.slow.set()
        codes = [one.error_code for one in await running]
        assert codes.count(results.NOT_SENT) == 2
        assert (progress.offered, progress.in_flight, progress.in_flight_max) == (5, 0, 3)

    serve(test)


def test_connections_are_kept_and_reused() -> None:
    """Every request would pay for a new connection, and ports would run out."""

    async def test(server: FakeServer) -> None:
        seen = await closed_loop([record(2)] * 20, options(server), concurrency=4)
        assert all(one.completed for one in seen)
        assert len(server.connections) <= 4

    serve(test)


def test_closed_loop_holds_its_concurrency() -> None:
    """A capacity would be measured with other than the stated number in flight."""

    async def test(server: FakeServer) -> None:
        progress = Progress()
        seen = await closed_loop(
            [record(3)] * 50, options(server), concurrency=7, progress=progress
        )
        assert len(seen) == 50
        assert all(one.completed for one in seen)
        assert progress.in_flight_max == 7
        assert await closed_loop([], options(server), concurrency=2) == []
        with pytest.raises(ConfigInvalid, match="concurrency"):
            await closed_loop([], options(server, connections_max=1), concurrency=2)

    serve(test)


def test_stop_ends_a_replay_early() -> None:
    """Ctrl-C would lose what was measured so far."""

    async def test(server: FakeServer) -> None:
        progress = Progress()
        trace = [record(2), record(fake_openai.SLOW, at_s=0.01), record(2, at_s=3600.0)]
        running = asyncio.ensure_future(replay(trace, options(server), progress=progress))
        while len(server.bodies) < 2 or progress.completed < 1:
            await asyncio.sleep(0.005)
        progress.stop.set()
        seen = await running
        assert [one.error_code for one in seen] == [results.OK, results.STOPPED]

    serve(test)


def test_a_kept_connection_that_closed_is_replaced_once() -> None:
    """A server's idle timeout would show as failed requests."""

    async def main() -> None:
        connections = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await answer(reader, writer)
            if connections == 1:  # take the second request, and close without a word
                await reader.readuntil(b"\r\n\r\n")
            else:
                await answer(reader, writer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            wanted = ClientOptions(url=f"http://{host}:{port}", model="m")
            seen = await closed_loop([record(1)] * 2, wanted, concurrency=1)
        assert [(one.error_code, one.resends) for one in seen] == [("", 0), ("", 1)]

    asyncio.run(main())


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read a request and stream one token, in TCP segments that split lines and chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    choice = b'data: {"choices":[{"text":"a","finish_reason":"stop","token_ids":[7]}]}\r\n\r\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":1}}\r\n\r\n'
    body = choice + usage + b"data: [DONE]\r\n\r\n"
    wire = b"HTTP/1.1 100 Continue\r\n\r\n"
    wire += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for place in range(0, len(body), 50):
        part = body[place : place + 50]
        wire += b"%x;ext=1\r\n%b\r\n" % (len(part), part)
    wire += b"0\r\nTrailer: x\r\n\r\n"
    for place in range(0, len(wire), 7):
        writer.write(wire[place : place + 7])
        await writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "wire",
    [
        b"SMTP ready\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
    ],
)
def test_a_peer_that_does_not_speak_http_is_named_so(wire: bytes) -> None:
    """A wrong port would hang the replay or fill its memory."""

    async def main() -> RequestResult:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(wire)
            await reader.read()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            wanted = ClientOptions(url=f"http://{host}:{port}", model="m")
            (result,) = await replay([record(1)], wanted)
        return result

    assert asyncio.run(main()).error_code == results.BAD_ANSWER


def test_probe_lists_models_or_says_why_not() -> None:
    """A wrong URL would be found out by ten thousand failed requests."""

    async def test(server: FakeServer) -> None:
        assert await served_models(server.url) == ["fake"]
        assert await served_models(server.url + "/v1/") == ["fake"]
        with pytest.raises(ServerUnreachable, match="404"):
            await served_models(server.url + "/elsewhere")
        with pytest.raises(ServerUnreachable, match="cannot be reached"):
            await served_models("http://127.0.0.1:9")
        with pytest.raises(ConfigInvalid, match="url"):
            await served_models("127.0.0.1:8000")

    serve(test)
