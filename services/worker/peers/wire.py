"""Bytes and descriptors over one connected socket, waited for by poll.

The socket itself never blocks: threads that send and receive at once share no timeout of it.
"""

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence

from shared.errors import PeerLost

DESCRIPTORS_MAX = 128
SEND_STALL_S = 30.0  # a peer that takes not one byte for so long is lost

_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_QUIET = getattr(socket, "MSG_NOSIGNAL", 0)
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Wire:
    """Raises PeerLost (the peer is gone or silent) and OSError. ``heard_s``: time.monotonic() when
    bytes last came."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.local = sock.family == socket.AF_UNIX
        self.peer, self.socket = peer, sock
        self.heard_s = time.monotonic()
        sock.setblocking(False)
        if not self.local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def write(self, payload: bytes | memoryview) -> None:
        view = memoryview(payload)
        while view.nbytes:
            try:
                view = view[self.socket.send(view, _QUIET) :]
            except BlockingIOError:
                self._await_room()

    def write_with(self, payload: bytes, fds: Sequence[int]) -> None:
        """The descriptors go with the first byte."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        while True:
            try:
                sent = self.socket.sendmsg([payload], rights, _QUIET)
            except BlockingIOError:
                self._await_room()
            else:
                return self.write(payload[sent:])

    def read(self, view: memoryview, deadline_s: float | None) -> None:
        while view.nbytes:
            try:
                count = self.socket.recv_into(view)
            except BlockingIOError:
                self._await_bytes(deadline_s)
                continue
            self._came(count)
            view = view[count:]

    def read_with(self, count: int, deadline_s: float | None) -> tuple[bytes, list[int]]:
        """``count`` bytes and the descriptors that come with them, which are then the caller's."""
        payload, fds = b"", array.array("i")
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * fds.itemsize) if self.local else 0
        try:
            while len(payload) < count:
                try:
                    part, ancillary, flags, _ = self.socket.recvmsg(
                        count - len(payload), space, _CLOEXEC
                    )
                except BlockingIOError:
                    self._await_bytes(deadline_s)
                    continue
                for level, kind, rights in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
                self._came(len(part), lost_descriptors=bool(flags & socket.MSG_CTRUNC))
                payload += part
        except BaseException:
            close_all(fds.tolist())
            raise
        return payload, fds.tolist()

    def has_room(self) -> bool:
        """A short message would be taken at once."""
        return self._ready(select.POLLOUT, 0.0)

    def has_bytes(self) -> bool:
        """Something came, or the peer is gone."""
        return self._ready(select.POLLIN, 0.0)

    def _came(self, count: int, *, lost_descriptors: bool = False) -> None:
        if count == 0:
            raise PeerLost(f"{self.peer} has closed the link")
        if lost_descriptors:
            raise PeerLost(f"{self.peer} sent descriptors that found no room")
        self.heard_s = time.monotonic()

    def _await_room(self) -> None:
        if not self._ready(select.POLLOUT, SEND_STALL_S):
            raise PeerLost(f"{self.peer} has taken nothing for {SEND_STALL_S:g} s")

    def _await_bytes(self, deadline_s: float | None) -> None:
        wait_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        if not self._ready(select.POLLIN, wait_s):
            raise PeerLost(f"{self.peer} is silent")

    def _ready(self, event: int, wait_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self.socket, event)
        return bool(poll.poll(None if wait_s is None else int(wait_s * 1e3) + (wait_s > 0)))


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
