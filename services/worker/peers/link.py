"""One link between two workers: messages, descriptors and bulk bytes, in order.

A frame is a header (kind, number of descriptors, length) and its bytes. Descriptors travel with the
header, over Unix sockets only. A link is either whole or closed: whatever fails closes it, so that
nobody reads from the middle of a frame.
"""

import contextlib
import hashlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

import msgspec

from services.worker.peers.address import PeerAddress
from services.worker.peers.wire import DESCRIPTORS_MAX, Wire, close_all
from shared.errors import PeerLost

MESSAGE_BYTES_MAX = 64 << 20
WORDS_BYTES_MAX = 4096  # of an error frame
CALL_BYTES_MAX = 4096  # of the frame that names a topic: the one that strangers may send

_HEADER = struct.Struct("!BBQ")
_MESSAGE, _ERROR, _BULK = range(3)
_BACKLOG_RETRY_S = 0.01
_JOINED_BYTES_MAX = 1 << 16  # payloads up to here are sent in one piece with their header


class PeerRefused(PeerLost):
    """The peer is there and says no; the text holds its words."""


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A caller's first message: it proves that it knows the secret, and names the topic."""

    proof: bytes
    topic: str


class PeerLink:
    """Any thread may send; one thread at a time may receive. All errors are PeerLost (the peer is
    gone, silent, or does not keep to the protocol) or PeerRefused, and close the link."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """Owns the connected ``sock``; ``peer`` names the other side in errors."""
        self.peer = peer
        self._wire = Wire(sock, peer)
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._users = 0
        self._closed = False

    @property
    def local(self) -> bool:
        """A Unix socket: descriptors can be passed."""
        return self._wire.local

    @property
    def heard_s(self) -> float:
        """time.monotonic() when bytes last came."""
        return self._wire.heard_s

    @property
    def closed(self) -> bool:
        return self._closed

    def fileno(self) -> int:
        """For poll; -1 once closed."""
        return self._wire.socket.fileno()

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """One message of at most MESSAGE_BYTES_MAX. ``fds`` stay the caller's. A message too large,
        and descriptors over TCP, are bugs of the caller: ValueError, and the link stays whole."""
        if len(payload) > MESSAGE_BYTES_MAX or len(fds) > DESCRIPTORS_MAX:
            raise ValueError(
                f"{len(payload)} bytes, {len(fds)} descriptors: too much for a message"
            )
        if fds and not self.local:
            raise ValueError("descriptors pass over Unix sockets only: check link.local")
        self._send(_MESSAGE, payload, fds)

    def try_send(self, payload: bytes) -> bool:
        """Send a short message, unless that would wait for another thread's send, or the peer; or
        the peer is gone: that is for who receives to find out, after what the peer said last."""
        if not self._sending.acquire(blocking=False):
            return False
        try:
            with self._using():
                if not self._wire.has_room():
                    return False
                try:
                    self._wire.write(_HEADER.pack(_MESSAGE, 0, len(payload)) + payload)
                except OSError:
                    return False
                return True
        finally:
            self._sending.release()

    def recv(self, timeout_s: float | None = None) -> bytes:
        """The next message; None waits until one comes or the peer is gone."""
        payload, fds = self.recv_fds(timeout_s)
        if fds:
            close_all(fds)
            self.close()
            raise PeerLost(f"{self.peer} sent descriptors that nobody asked for")
        return payload

    def recv_fds(
        self, timeout_s: float | None = None, *, bytes_max: int = MESSAGE_BYTES_MAX
    ) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, which are the caller's to close."""
        deadline_s = _deadline(timeout_s)
        with self._using():
            length, fds = self._receive_header(_MESSAGE, deadline_s)
            try:
                _check_length(length, bytes_max, self.peer)
                payload = bytearray(length)
                self._wire.read(memoryview(payload), deadline_s)
            except BaseException:
                close_all(fds)
                raise
        return bytes(payload), fds

    def has_bytes(self) -> bool:
        """Whether recv would find something at once; PeerLost once closed."""
        with self._using():
            return self._wire.has_bytes()

    def send_bulk(self, buffer: Any) -> None:  # noqa: ANN401  # whatever has the buffer protocol
        """The bytes of a contiguous buffer of any size, without a copy on this side."""
        self._send(_BULK, memoryview(buffer).cast("B"))

    def recv_bulk_into(self, buffer: Any, timeout_s: float | None = None) -> None:  # noqa: ANN401
        """Fill the writable, contiguous ``buffer`` by the next bulk, which is as long as that."""
        view, deadline_s = memoryview(buffer).cast("B"), _deadline(timeout_s)
        with self._using():
            length, fds = self._receive_header(_BULK, deadline_s)
            if fds or length != view.nbytes:
                close_all(fds)
                raise PeerLost(f"{self.peer} sent {length} bytes where {view.nbytes} were to come")
            self._wire.read(view, deadline_s)

    def refuse(self, words: str) -> None:
        """Tell the peer why, in as far as it still listens, and close."""
        with contextlib.suppress(PeerLost):
            self._send(_ERROR, words.encode()[:WORDS_BYTES_MAX])
        self.close()

    def detach(self) -> socket.socket:
        """The socket itself, non-blocking, which is then the caller's: this link is closed, and so
        the server forgets it. Raises PeerLost where the link is closed, or in use."""
        with self._state:
            if self._closed or self._users:
                raise PeerLost(f"the link to {self.peer} is closed, or in use")
            self._closed = True
            return self._wire.socket

    def close(self) -> None:
        """Idempotent, from any thread: whoever waits in this link gets PeerLost."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError):  # the peer was faster
                self._wire.socket.shutdown(socket.SHUT_RDWR)
            if self._users == 0:
                self._wire.socket.close()

    @contextlib.contextmanager
    def _using(self) -> Generator[None]:
        """The descriptor stays open while a thread is in a call: its number could be another
        file's by then. Whatever goes wrong inside closes the link."""
        with self._state:
            if self._closed:
                raise PeerLost(f"the link to {self.peer} is closed")
            self._users += 1
        try:
            yield
        except OSError as error:
            self.close()
            raise PeerLost(f"{self.peer} is gone: {error}") from error
        except BaseException:
            self.close()
            raise
        finally:
            with self._state:
                self._users -= 1
                if self._closed and self._users == 0:
                    self._wire.socket.close()

    def _send(self, kind: int, payload: bytes | memoryview, fds: Sequence[int] = ()) -> None:
        header = _HEADER.pack(kind, len(fds), len(payload))
        with self._sending, self._using():
            if fds:
                self._wire.write_with(header, fds)
                self._wire.write(payload)
            elif len(payload) <= _JOINED_BYTES_MAX:
                self._wire.write(header + bytes(payload))
            else:
                self._wire.write(header)
                self._wire.write(payload)

    def _receive_header(self, expected: int, deadline_s: float | None) -> tuple[int, list[int]]:
        """Length and descriptors of the next frame, which must be of the kind ``expected``."""
        header, fds = self._wire.read_with(_HEADER.size, deadline_s)
        kind, count, length = _HEADER.unpack(header)
        if kind == expected and count == len(fds):
            return length, fds
        close_all(fds)
        if kind == _ERROR and length <= WORDS_BYTES_MAX:
            words = bytearray(length)
            self._wire.read(memoryview(words), deadline_s)
            raise PeerRefused(f"{self.peer}: {words.decode(errors='replace')}")
        raise PeerLost(f"{self.peer} sent frame {(kind, count, length)}, not of kind {expected}")


def connect(
    address: str, topic: str, hello: bytes = b"", *, timeout_s: float, force_tcp: bool = False
) -> PeerLink:
    """A link to who offers ``topic`` at ``address``, which has got ``hello``. PeerRefused where
    nobody offers it there; ``timeout_s`` is for the whole. On one host it is a Unix socket, but for
    ``force_tcp``."""
    there, deadline_s = PeerAddress.decode(address), time.monotonic() + timeout_s
    link = PeerLink(_dial(there, deadline_s, force_tcp=force_tcp), f"worker {there.worker_id}")
    try:
        challenge = link.recv(deadline_s - time.monotonic())
        call = Call(proof_of(there.secret, challenge, topic), topic)
        link.send(msgspec.msgpack.encode(call))
        link.recv(deadline_s - time.monotonic())  # accepted, or PeerRefused
        link.send(hello)
    except BaseException:
        link.close()
        raise
    return link


def proof_of(secret: str, challenge: bytes, topic: str) -> bytes:
    """What only one who knows ``secret`` can say to ``challenge``; it cannot be used twice."""
    return hmac.digest(bytes.fromhex(secret), challenge + topic.encode(), hashlib.sha256)


def _dial(there: PeerAddress, deadline_s: float, *, force_tcp: bool) -> socket.socket:
    """Over TCP where the Unix socket is gone, too."""
    if there.same_host and not force_tcp:
        with contextlib.suppress(OSError, PeerLost):
            return _dialled(socket.AF_UNIX, there.place, deadline_s)
    family = socket.AF_INET6 if ":" in there.host else socket.AF_INET
    try:
        return _dialled(family, (there.host, there.port), deadline_s)
    except OSError as error:
        raise PeerLost(f"worker {there.worker_id} cannot be reached: {error}") from error


def _dialled(family: int, place: str | tuple[str, int], deadline_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        while (wait_s := deadline_s - time.monotonic()) > 0:
            sock.settimeout(wait_s)
            try:
                sock.connect(place)
            except BlockingIOError:  # its queue of callers is full
                time.sleep(_BACKLOG_RETRY_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise PeerLost(f"{place} did not answer in time")


def _check_length(length: int, bytes_max: int, peer: str) -> None:
    if length > bytes_max:
        raise PeerLost(f"{peer} sent a message of {length} bytes, more than {bytes_max}")


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s
