"""Links between workers: who is let in, what passes, and what becomes of those who wait."""

import gc
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.peers import link as link_module
from services.worker.peers import server as server_module
from services.worker.peers.address import PeerAddress
from services.worker.peers.link import PeerLink, PeerRefused, connect
from services.worker.peers.segment import Segment
from services.worker.peers.server import NAMELESS, STRANGERS_MAX, PeerServer
from services.worker.peers.wire import DESCRIPTORS_MAX
from shared.errors import ConfigInvalid, PeerLost

WAIT_S = 20.0


def open_fds() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def echo(link: PeerLink, hello: bytes) -> None:
    link.send(b"hello " + hello)
    while True:
        payload, fds = link.recv_fds()
        link.send(payload, fds)
        for fd in fds:
            os.close(fd)


def ask(
    address: str, topic: str, hello: bytes = b"", *, timeout_s: float, force_tcp: bool = False
) -> bytes:
    """One question, one reply, on a link of its own."""
    link = connect(address, topic, hello, timeout_s=timeout_s, force_tcp=force_tcp)
    try:
        return link.recv(timeout_s)
    finally:
        link.close()


@pytest.fixture
def server() -> Iterator[PeerServer]:
    server = PeerServer(worker_id="w0")
    server.offer("echo", echo)
    yield server
    server.close()


@pytest.fixture(params=["unix", "tcp"])
def echoed(server: PeerServer, request: pytest.FixtureRequest) -> Iterator[PeerLink]:
    tcp = request.param == "tcp"
    link = connect(server.address, "echo", b"you", timeout_s=WAIT_S, force_tcp=tcp)
    assert link.local is not tcp
    assert link.recv(WAIT_S) == b"hello you"
    yield link
    link.close()


def test_messages_come_back_whole_and_in_order(echoed: PeerLink) -> None:
    """A state of a request would arrive cut, or after the one that replaced it."""
    for size in (0, 1, 65_526, 65_527, 3_000_000):
        echoed.send(bytes([size % 251]) * size)
        assert echoed.recv(WAIT_S) == bytes([size % 251]) * size


@given(payloads=st.lists(st.binary(max_size=300), max_size=20))
def test_frames_keep_their_bounds(payloads: list[bytes]) -> None:
    """Two messages would be read as one."""
    ends = socket.socketpair()
    one, other = (PeerLink(end, "end") for end in ends)
    for payload in payloads:
        one.send(payload)
    assert [other.recv(WAIT_S) for _ in payloads] == payloads
    one.close()
    other.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_bulk_bytes_arrive_in_place(server: PeerServer, tcp: bool) -> None:
    """Weights would arrive wrong."""
    weights = bytearray(os.urandom(1 << 20)) * 5

    def serve(link: PeerLink, hello: bytes) -> None:
        link.send_bulk(memoryview(weights)[int(hello) :])

    server.offer("weights", serve)
    link = connect(server.address, "weights", b"7", timeout_s=WAIT_S, force_tcp=tcp)
    into = bytearray(len(weights) - 7)
    link.recv_bulk_into(into, WAIT_S)
    assert into == weights[7:]
    link.close()


def test_bulk_of_another_length_is_an_error(server: PeerServer) -> None:
    """Half of a shard would be taken for the whole."""
    server.offer("weights", lambda link, _: link.send_bulk(b"abc"))
    link = connect(server.address, "weights", timeout_s=WAIT_S)
    with pytest.raises(PeerLost, match="3 bytes where 4"):
        link.recv_bulk_into(bytearray(4), WAIT_S)
    assert link.closed


def test_descriptors_pass_between_processes_of_one_host(server: PeerServer) -> None:
    """KV cache would be copied twice on its way to the next process."""
    before = open_fds()
    segment = Segment.create(8192, "kv")
    segment.buffer[5] = 77
    link = connect(server.address, "echo", timeout_s=WAIT_S)
    link.recv(WAIT_S)
    link.send(b"take", [segment.fd])
    payload, (fd,) = link.recv_fds(WAIT_S)
    seen = Segment.map(fd, 8192)
    assert (payload, seen.buffer[5], seen.buffer.readonly) == (b"take", 77, True)
    segment.buffer[6] = 78
    assert seen.buffer[6] == 78
    for closing in (segment, seen, link):
        closing.close()
        closing.close()
    server.close()
    assert open_fds() < before  # the server's own are gone, too


def test_descriptors_that_nobody_asked_for_are_closed(server: PeerServer) -> None:
    """A worker would run out of descriptors by what others send it."""
    link = connect(server.address, "echo", timeout_s=WAIT_S)
    link.recv(WAIT_S)
    with Path(os.devnull).open() as null:
        link.send(b"", [null.fileno()] * 3)
        before = open_fds()
        with pytest.raises(PeerLost, match="nobody asked"):
            link.recv(WAIT_S)
    server.close()
    assert open_fds() < before


def test_descriptors_and_sizes_out_of_bounds_are_the_callers_bug(
    echoed: PeerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer would be called lost for what it never did."""
    monkeypatch.setattr(link_module, "MESSAGE_BYTES_MAX", 10)
    with pytest.raises(ValueError, match="too much"):
        echoed.send(b"x" * 11)
    with pytest.raises(ValueError, match="too much"):
        echoed.send(b"x", [0] * (DESCRIPTORS_MAX + 1))
    if not echoed.local:
        with pytest.raises(ValueError, match="Unix"):
            echoed.send(b"x", [0])
    echoed.send(b"fine")
    assert echoed.recv(WAIT_S) == b"fine"


def test_a_message_beyond_the_bound_is_not_read(server: PeerServer) -> None:
    """A stranger's length would take all memory."""
    ends = socket.socketpair()
    link = PeerLink(ends[0], "stranger")
    ends[1].send(bytes([0, 0]) + (1 << 40).to_bytes(8, "big"))
    with pytest.raises(PeerLost, match="more than"):
        link.recv(WAIT_S)
    ends[1].close()


def test_the_secret_opens_the_door(server: PeerServer) -> None:
    """Anyone who reaches the port could read weights and prompts."""
    address = msgspec.json.decode(server.address, type=PeerAddress)
    stranger = msgspec.structs.replace(address, secret="00" * 32).encode()
    for tcp in (False, True):
        with pytest.raises(PeerRefused, match="secret"):
            connect(stranger, "echo", timeout_s=WAIT_S, force_tcp=tcp)


def test_a_topic_that_nobody_offers_is_refused(server: PeerServer) -> None:
    """A caller would wait for a replica that is not there."""
    with pytest.raises(PeerRefused, match="nobody offers other"):
        connect(server.address, "other", timeout_s=WAIT_S)
    server.withdraw("echo", handler=lambda _, __: None)  # another's handler stays
    connect(server.address, "echo", timeout_s=WAIT_S).close()
    server.withdraw("echo", echo)
    with pytest.raises(PeerRefused):
        connect(server.address, "echo", timeout_s=WAIT_S)


def test_what_a_handler_raises_is_told(
    server: PeerServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller would wait out its time, and nobody would know why."""

    def fail(link: PeerLink, hello: bytes) -> None:
        raise KeyError(hello)

    def lose(link: PeerLink, hello: bytes) -> None:
        raise PeerLost("worker n9 is gone")

    server.offer("fail", fail)
    server.offer("lose", lose)
    with pytest.raises(PeerRefused, match="KeyError: b'7'"):
        ask(server.address, "fail", b"7", timeout_s=WAIT_S)
    with pytest.raises(PeerRefused, match="n9 is gone"):
        ask(server.address, "lose", timeout_s=WAIT_S)
    assert "peers.handler_failed" in caplog.text


def test_ask_brings_one_reply(server: PeerServer) -> None:
    """States of requests would not be told."""
    for tcp in (False, True):
        reply = ask(server.address, "echo", b"x", timeout_s=WAIT_S, force_tcp=tcp)
        assert reply == b"hello x"


def test_a_silent_peer_is_lost_in_time(server: PeerServer) -> None:
    """A worker that hangs would hang those who ask it."""
    held = threading.Event()

    def hold(link: PeerLink, hello: bytes) -> None:
        held.wait(WAIT_S)

    server.offer("hold", hold)
    with pytest.raises(PeerLost, match="silent"):
        ask(server.address, "hold", timeout_s=0.2)
    held.set()


def test_a_peer_that_is_gone_is_lost_at_once(server: PeerServer) -> None:
    """A switch would wait for one that is no more."""
    link = connect(server.address, "echo", timeout_s=WAIT_S)
    link.recv(WAIT_S)
    waiting = threading.Thread(target=server.close)
    waiting.start()
    with pytest.raises(PeerLost):
        link.recv()
    waiting.join()
    with pytest.raises(PeerLost, match="reached"):
        connect(server.address, "echo", timeout_s=WAIT_S)


def test_closing_wakes_who_waits(server: PeerServer) -> None:
    """A rank would sleep on after its session's end."""
    link = connect(server.address, "echo", timeout_s=WAIT_S)
    link.recv(WAIT_S)
    raised: list[PeerLost] = []

    def wait() -> None:
        try:
            link.recv()
        except PeerLost as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    link.close()
    waiting.join(WAIT_S)
    assert len(raised) == 1
    with pytest.raises(PeerLost, match="closed"):
        link.send(b"")


def test_an_unreadable_address_is_a_lost_peer() -> None:
    """A worker of an older release would stop the switch by an error that nobody catches."""
    for address in ("", "127.0.0.1:80", "{}"):
        with pytest.raises(PeerLost, match="address"):
            connect(address, "echo", timeout_s=WAIT_S)


def test_connections_are_bounded(server: PeerServer) -> None:
    """Callers without end would take every thread of the worker."""
    small = PeerServer(worker_id="w1", connections_max=2)
    small.offer("echo", echo)
    links = [connect(small.address, "echo", timeout_s=WAIT_S) for _ in range(2)]
    with pytest.raises(PeerRefused, match="too many"):
        connect(small.address, "echo", timeout_s=WAIT_S)
    for link in links:
        link.close()
    small.close()


def test_strangers_keep_no_peer_out(server: PeerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the port could stop all switches by calling often and saying nothing."""
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 10 * WAIT_S)
    address = msgspec.json.decode(server.address, type=PeerAddress)
    place = address.host, address.port
    silent = [socket.create_connection(place) for _ in range(STRANGERS_MAX + 8)]
    links = [connect(server.address, "echo", timeout_s=WAIT_S) for _ in range(STRANGERS_MAX + 8)]
    for link in links:  # those let in are not pushed out
        assert link.recv(WAIT_S) == b"hello "
    for sock in silent[:8]:  # the first of the silent ones had to go
        sock.settimeout(WAIT_S)
        while sock.recv(4096):
            pass
    for end in (*links, *silent):
        end.close()


def test_the_acceptor_survives_what_goes_wrong(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker out of threads for a moment would be deaf for good."""
    start, failing = threading.Thread.start, iter(range(3))

    def failed(thread: threading.Thread) -> None:
        if next(failing, None) is not None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failed)
    for _ in range(3):
        with pytest.raises(PeerLost):
            connect(server.address, "echo", timeout_s=WAIT_S)
    assert ask(server.address, "echo", b"x", timeout_s=WAIT_S) == b"hello x"
    assert caplog.text.count("peers.accept_failed") == 3


def test_a_socket_path_that_is_too_long_names_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator would read EINVAL."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(server_module, "NAMELESS", False)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigInvalid, match="shorter"):
        PeerServer(worker_id="w0")
    assert not list(deep.iterdir())


@pytest.mark.skipif(not NAMELESS, reason="sockets without a file are Linux's")
def test_a_killed_worker_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files would fill with those of workers long gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = PeerServer(worker_id="w0")
    server.offer("echo", echo)
    link = connect(server.address, "echo", timeout_s=WAIT_S)
    assert (link.local, list(tmp_path.iterdir())) == (True, [])
    link.close()
    server.close()


@pytest.mark.parametrize("nameless", [NAMELESS, False])
def test_many_links_leave_nothing_behind(nameless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred switches would end a worker for want of descriptors."""
    monkeypatch.setattr(server_module, "NAMELESS", nameless)
    before, threads = open_fds(), threading.active_count()
    for _ in range(5):
        server = PeerServer(worker_id="w0")
        server.offer("echo", echo)
        for count in range(20):
            ask(server.address, "echo", timeout_s=WAIT_S, force_tcp=count % 2 == 0)
        path = msgspec.json.decode(server.address, type=PeerAddress).path
        assert nameless or Path(path).parent.stat().st_mode & 0o777 == 0o700
        server.close()
        server.close()
        assert nameless or not Path(path).parent.exists()
    assert (open_fds(), threading.active_count()) == (before, threads)


def test_a_segment_of_wrong_size_is_refused_and_closed() -> None:
    """Reading beyond the end of a file kills the process."""
    segment = Segment.create(4096, "small")
    before = open_fds()
    for byte_count in (4097, 0, -1):
        with pytest.raises(ValueError, match="byte_count"):
            Segment.map(os.dup(segment.fd), byte_count)
    with pytest.raises(ValueError, match="byte_count"):
        Segment.create(0, "none")
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(segment.fd, 0)
    assert open_fds() == before
    segment.close()


def test_views_keep_a_closed_segment_alive() -> None:
    """A tensor over freed memory would kill the process."""
    segment = Segment.create(4096, "kept")
    segment.buffer[0] = 9
    view = segment.buffer[:10]
    segment.close()
    segment.close()
    assert view[0] == 9


def test_without_memfd_a_segment_is_a_nameless_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mesh would not start on macOS."""
    monkeypatch.delattr(os, "memfd_create")
    segment = Segment.create(4096, "a/b")
    segment.buffer[1] = 3
    other = Segment.map(os.dup(segment.fd), 4096, writable=True)
    other.buffer[2] = 4
    assert segment.buffer[:3].tolist() == [0, 3, 4]
    segment.close()
    other.close()
