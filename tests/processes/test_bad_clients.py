"""Clients that are broken, slow or hostile, against the ingress as a process of its own: whatever
they send, they get an answer or are closed, and others are served meanwhile."""

import gzip
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest

from tests.support.broker import Broker
from tests.support.up import Up, complete, write_topology

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

IDLE = 10_000
FIRST_REQUEST_S, BODY_S, CLIENT_READ_S = 4.0, 1.0, 1.5
SETTINGS = f"""
[ingress]
first_request_s = {FIRST_REQUEST_S}
body_s = {BODY_S}
client_read_s = {CLIENT_READ_S}
"""
BODY = json.dumps({"model": "modelled", "prompt": "hi", "max_tokens": 4, "temperature": 0}).encode()


class Edge:
    """One ingress, by its port and its process."""

    def __init__(self, up: Up) -> None:
        self.url = up.url()
        self.port = int(self.url.rpartition(":")[2])
        children = psutil.Process(up.process.pid).children(recursive=True)
        (self.process,) = [p for p in children if "services.ingress" in p.cmdline()]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def talk(self, *parts: bytes, half_close: bool = False) -> bytes:
        """Send, then read until the ingress closes."""
        with self.connect() as client:
            for part in parts:
                client.sendall(part)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_all(client)

    def open_requests(self) -> float:
        text = self.talk(request("GET", "/metrics", close=True)).decode()
        (line,) = [
            one for one in text.splitlines() if one.startswith("oserve_ingress_open_requests ")
        ]
        return float(line.split()[1])

    def wait_idle(self) -> None:
        deadline_s = time.monotonic() + 10
        while self.open_requests():
            assert time.monotonic() < deadline_s, "requests of clients that are gone stay open"
            time.sleep(0.02)


def read_all(client: socket.socket) -> bytes:
    data = b""
    try:
        while more := client.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    return data


def request(
    method: str = "POST",
    path: str = "/v1/completions",
    body: bytes = b"",
    *headers: str,
    close: bool = False,
    version: str = "1.1",
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with Up(write_topology(tmp_path_factory.mktemp("edge"), SETTINGS)) as up:
        yield Edge(up)
        up.interrupt()
        assert up.exit_code() == 0, up.output


@pytest.fixture(autouse=True)
def _serves_on(edge: Edge) -> Iterator[None]:
    """After each test the same process serves, and holds nothing of it."""
    yield
    assert edge.process.is_running()
    assert complete(edge.url)["usage"]["completion_tokens"] == 4
    edge.wait_idle()


LARGE = b"a" * (5 << 20)
BOMB = gzip.compress(b'{"model": "' + b"a" * (64 << 20) + b'"}')
GZIP = "Content-Encoding: gzip"
GET, POST = ("GET", "/health"), ("POST", "/v1/completions")
CHUNKED = "Transfer-Encoding: chunked"
HEADERS = [f"h{number}: x" for number in range(1000)]
BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "not http": (b"\x00\x01\x02\x03 hello\r\n\r\n", {400}),
    "a tls hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + b"\xaa" * 500 + b"\r\n\r\n", {400}),
    "a thousand headers": (request(*GET, b"", *HEADERS), {400}),
    "a huge header": (request(*GET, b"", "h: " + "x" * 100_000), {400}),
    "a huge path": (request("GET", "/" + "x" * 100_000), {400, 414}),
    "two lengths": (request(*POST, b"", "Content-Length: 3", "Content-Length: 4") + b"abc", {400}),
    "a negative length": (request(*POST, b"", "Content-Length: -1"), {400}),
    "length and chunks": (request(*POST, BODY, CHUNKED), {400}),
    "a chunk of no size": (request(*POST, b"", CHUNKED) + b"zz\r\nabc\r\n", {400}),
    "what is not gzip": (request(*POST, b"not gzip", GZIP, close=True), {400}),
    "a gzip bomb": (request(*POST, BOMB, GZIP, close=True), {400, 413}),
    "truncated json": (request(body=BODY[:-5], close=True), {400}),
    "nested json": (request(body=b'{"model":' + b"[" * 100_000, close=True), {400}),
    "not utf-8": (request(body=b'{"model": "\xff\xfe"}', close=True), {400}),
    "a list": (request(body=b"[1, 2]", close=True), {400}),
    "wrong types": (request(body=b'{"model": 7, "prompt": {}}', close=True), {400}),
    "no body": (request(close=True), {400}),
    "too much": (request(body=b'{"model": "' + LARGE + b'"}', close=True), {413}),
    "too much in chunks": (request(*POST, b"", CHUNKED, close=True) + chunked(LARGE), {413}),
    "an odd expectation": (request(*POST, BODY, "Expect: tea", close=True), {417}),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", {200, 400}),
    "an odd method": (request("BREW", "/v1/completions", close=True), {400, 405}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_answered(edge: Edge, name: str) -> None:
    """A client's mistake would cost us a stack trace, a descriptor or the process."""
    data, statuses = BROKEN[name]
    memory_bytes = edge.process.memory_info().rss
    answer = edge.talk(data)
    assert answer.startswith(b"HTTP/1."), answer[:200]
    assert int(answer.split()[1]) in statuses, answer[:500]
    assert b"Traceback" not in answer
    assert edge.process.memory_info().rss - memory_bytes < 64 << 20


def test_a_connection_goes_on_after_an_error(edge: Edge) -> None:
    """Clients with a pool of connections would see one error after another."""
    answer = edge.talk(request(body=b"{"), request(body=BODY), request("GET", "/nothing"),
                       request("GET", "/health", close=True))  # fmt: skip
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [400, 200, 404, 200]


def test_pipelined_requests_are_answered_in_order(edge: Edge) -> None:
    """A client would take one answer for another."""
    bodies = [json.dumps({"model": "modelled", "prompt": "x", "max_tokens": n}).encode()
              for n in (24, 1, 8)]  # fmt: skip
    answer = edge.talk(
        b"".join(request(body=body) for body in bodies) + request("GET", "/health", close=True)
    )
    counts = [int(part.partition(b",")[0]) for part in answer.split(b'"completion_tokens":')[1:]]
    assert counts == [24, 1, 8]
    ids = [line for line in answer.split(b"\r\n") if line.lower().startswith(b"x-request-id")]
    assert len(set(ids)) == 4


def test_a_flood_of_pipelined_requests_is_bounded(edge: Edge) -> None:
    """One connection could fill our memory with requests that wait for each other."""
    memory_bytes = edge.process.memory_info().rss
    with edge.connect() as client:
        client.settimeout(0.2)
        long = json.dumps({"model": "modelled", "prompt": "x", "max_tokens": 1500}).encode()
        client.sendall(request(body=long))
        flood = request("GET", "/health") * 1000
        try:
            for _ in range(1000):
                client.sendall(flood)
        except TimeoutError:
            pass
        else:
            pytest.fail("50 MB of requests were taken in while one was being served")
        assert edge.process.memory_info().rss - memory_bytes < 32 << 20


def test_other_methods(edge: Edge) -> None:
    """Health checks by HEAD, or a browser's OPTIONS, would hang or break the connection."""
    head = edge.talk(request("HEAD", "/health", close=True))
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    options = edge.talk(request("OPTIONS", "/v1/completions", close=True))
    assert options.startswith(b"HTTP/1.1 405")
    assert b"method_not_supported" in options


def test_http_1_0(edge: Edge) -> None:
    """Old clients could not tell where an answer ends."""
    whole = edge.talk(request(body=BODY, version="1.0"))
    assert whole.startswith(b"HTTP/1.0 200")
    stream = BODY[:-1] + b', "stream": true}'
    for headers in ((), ("Connection: keep-alive",)):
        raw = edge.talk(request("POST", "/v1/completions", stream, *headers, version="1.0"))
        assert b"chunked" not in raw.lower()
        assert raw.endswith(b"data: [DONE]\n\n")


def test_a_half_closed_connection_counts_as_gone(edge: Edge) -> None:
    """An engine would go on for a client that has left."""
    long = json.dumps({"model": "modelled", "prompt": "x", "max_tokens": 2000, "stream": True})
    started_s = time.monotonic()
    edge.talk(request(body=long.encode()), half_close=True)
    edge.wait_idle()
    assert time.monotonic() - started_s < 5.0  # the whole answer takes ten


def test_slow_heads_and_bodies_are_closed(edge: Edge) -> None:
    """A few clients that send a byte a second would hold every descriptor."""
    with closing(edge.connect()) as head, closing(edge.connect()) as body:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        body.sendall(request(body=BODY)[:-10])
        started_s = time.monotonic()
        for _ in range(int(10 * FIRST_REQUEST_S) + 30):
            time.sleep(0.1)
            try:
                head.sendall(b"a: b\r\n")
            except OSError:
                break
        else:
            pytest.fail("a head that never ends is still being read")
        assert time.monotonic() - started_s < FIRST_REQUEST_S + 3
        answer = body.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"did not arrive" in answer


def test_answers_that_nobody_reads_are_dropped(edge: Edge) -> None:
    """Clients that ask and do not read would keep their answers in our memory for ever."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", edge.port))
        client.setblocking(False)
        flood = request("GET", "/metrics") * 100
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            try:
                client.send(flood)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                return
        pytest.fail("still connected")


def test_ten_thousand_silent_connections(edge: Edge) -> None:
    """Whoever opens connections and says nothing would shut everyone else out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 500
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    count = min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    files, memory_bytes = edge.process.num_fds(), edge.process.memory_info().rss
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(edge.connect())) for _ in range(count)]
        seen_files = edge.process.num_fds()
        assert complete(edge.url)["usage"]["completion_tokens"] == 4
        grown_bytes = edge.process.memory_info().rss - memory_bytes
        print(f"{count} connections, {seen_files} files, {grown_bytes / 2**20:.0f} MiB more")  # noqa: T201
        assert grown_bytes < count * 40_000
        assert all(read_all(client) == b"" for client in clients)
        deadline_s = time.monotonic() + 10
        while edge.process.num_fds() > files + 10:
            assert time.monotonic() < deadline_s, edge.process.num_fds()
            time.sleep(0.05)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("service", "engine"), [("ingress", "modelled"), ("worker", "modelled"), ("worker", "torch")]
)
def test_a_bad_checkpoint_is_said_at_start(
    nats_server: Broker, tmp_path: Path, service: str, engine: str
) -> None:
    """A supervisor would restart for ever what only its operator can mend."""
    topology = write_topology(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    text = topology.read_text(encoding="utf-8")
    topology.write_text(text.replace("[mesh.model]", f'[mesh.model]\npath = "{folder}"'))
    settings = (f"bus.url={nats_server.url}", "ingress.port=0", f"mesh.engine.kind={engine}")
    command = [sys.executable, "-m", f"services.{service}", "--config", str(topology)]
    if service == "worker":
        settings += ("worker.worker_id=n0-g0",)
    for setting in settings:
        command += ("--set", setting)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
    assert ended.returncode == 78, ended.stderr[-500:]
    assert str(folder) in ended.stderr
