"""Words between two ranks of one host: a step is written, a piece announced, room given back."""

import collections
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from shared.errors import PeerLost

SPIN_S = 150e-6 if (os.cpu_count() or 1) > 1 else 0.0
"""How long a rank looks before it sleeps: about what being woken takes, and what ranks are apart in
a layer. Others may have its core meanwhile."""

_WORD = struct.Struct("!BQ")
_STEP, _PIECE, _ROOM = range(3)
_READ_BYTES = _WORD.size * 256


class Signals:
    """``steps``: how many steps the other has signalled; ``pieces``: the lengths of those announced
    and not yet taken; ``room``: bytes of the ring to it that it has given back, ever. They grow by
    ``pull`` alone. One thread calls, but for ``abort``. Raises PeerLost."""

    def __init__(self, sock: socket.socket, on_sleep: Callable[[bool], None]) -> None:
        """Owns ``sock``, which does not block. ``on_sleep`` is told when this rank begins to sleep
        until the other has signalled, and when it ends."""
        self._on_sleep = on_sleep
        self.steps, self.room = 0, 0
        self.pieces: collections.deque[int] = collections.deque()
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._rest = b""
        self._closing = threading.Lock()
        self._closed = False

    def step(self) -> None:
        self._send(_STEP, 0)

    def piece(self, length: int) -> None:
        self._send(_PIECE, length)

    def give_room(self, length: int) -> None:
        """One that has left needs none."""
        with contextlib.suppress(PeerLost):
            self._send(_ROOM, length)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until what the other has signalled makes ``ready`` true."""
        if ready():
            return
        until_s = time.perf_counter() + SPIN_S
        while True:
            self.pull()
            if ready():
                return
            if time.perf_counter() > until_s:
                self._sleep(self._poll)
            else:
                os.sched_yield()  # the other may be on this very core

    def _sleep(self, poll: select.poll) -> None:
        self._on_sleep(True)
        poll.poll()
        self._on_sleep(False)

    def pull(self) -> None:
        """Take what has come, without waiting."""
        try:
            part = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerLost(f"is gone: {error}") from error
        if not part:
            raise PeerLost("has left the group")
        words = self._rest + part
        whole = len(words) - len(words) % _WORD.size
        self._rest = words[whole:]
        for kind, value in _WORD.iter_unpack(words[:whole]):
            if kind == _STEP:
                self.steps += 1
            elif kind == _PIECE:
                self.pieces.append(value)
            else:
                self.room += value

    def abort(self) -> None:
        """From any thread: whoever waits gets PeerLost."""
        with self._closing:
            if not self._closed:
                _shut(self._socket)

    def close(self) -> None:
        """Idempotent."""
        with self._closing:
            if not self._closed:
                self._closed = True
                _shut(self._socket)
                self._socket.close()

    def _send(self, kind: int, value: int) -> None:
        word = _WORD.pack(kind, value)
        while word:
            try:
                word = word[self._socket.send(word) :]
            except BlockingIOError:  # the other is behind by hundreds of words, and may wait, too
                self._await_room()
            except OSError as error:
                raise PeerLost(f"is gone: {error}") from error

    def _await_room(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        self._sleep(poll)
        self.pull()


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other was faster
        return
