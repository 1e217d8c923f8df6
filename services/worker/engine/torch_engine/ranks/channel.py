"""One other rank of a session: its messages, its heartbeats, and when to call it lost."""

import collections
import contextlib
import enum
import struct
import threading
import time
from typing import Literal

import msgspec

from services.worker.peers.link import PeerLink
from shared.errors import PeerLost

MESSAGES_MAX = 1024  # that wait to be taken; a rank that sends more is out of step

_DATA, _BEAT, _END, _LOST = b"d", b"b", b"e", b"l"
_BEAT_BODY = struct.Struct("!QB")

State = Literal["joined", "ended"]


class Doing(enum.IntEnum):
    """What a rank is at. While it is busy it should make progress; while it waits for another
    rank of its replica, that one should."""

    IDLE = 0
    BUSY = 1
    WAITING = 2


class Loss(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others before it gives the session up."""

    rank: int
    reason: str


class OtherToldLoss(Exception):
    """The other rank has lost a third one."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        super().__init__(loss.reason)


class RankChannel:
    """Messages go through ``link``; one thread at a time reads, whoever needs to: the one that
    waits for a message, or the one that watches, so that heartbeats are heard while nobody waits.
    """

    def __init__(self, rank: int, link: PeerLink, *, stall_s: float, progress_s: float) -> None:
        self.rank, self.link = rank, link
        self.state: State = "joined"
        self.gone = threading.Event()  # the session needs the link no more
        self._stall_s, self._progress_s = stall_s, progress_s
        self._inbox: collections.deque[bytes] = collections.deque()
        self._reading = threading.Lock()
        self._beat = (0, Doing.IDLE)
        self._changed_s = time.monotonic()

    def send(self, payload: bytes) -> None:
        self.link.send(_DATA + payload)

    def recv(self, deadline_s: float | None) -> bytes | None:
        """The next message; None once the other rank has ended the session. Raises PeerLost."""
        while True:
            with self._reading:
                if self._inbox:
                    return self._inbox.popleft()
                if self.state == "ended":
                    return None
                self._take(self.link.recv(self._stall_s))
            if not self._inbox and deadline_s is not None and time.monotonic() > deadline_s:
                raise PeerLost("has not answered in time")

    def beat(self, progress: int, doing: Doing) -> None:
        """Tell the other that this process lives; not where that would wait."""
        self.link.try_send(_BEAT + _BEAT_BODY.pack(progress, doing))

    def hear(self) -> None:
        """Take what has come, without waiting for more. Raises PeerLost."""
        if self._reading.acquire(blocking=False):
            try:
                while self.state != "ended" and self.link.has_bytes():
                    self._take(self.link.recv(self._stall_s))
            finally:
                self._reading.release()

    @property
    def silence_s(self) -> float:
        """Since the other was heard last; 0 once it has ended."""
        return 0.0 if self.state == "ended" else time.monotonic() - self.link.heard_s

    @property
    def silent(self) -> str | None:
        """What is wrong with a rank that is stopped, or cannot be reached. Raises PeerLost."""
        if self.silence_s > self._stall_s and not self.link.has_bytes():
            return f"silent for {self._stall_s:g} s"
        return None

    @property
    def doing(self) -> Doing:
        """As it has told last."""
        return self._beat[1]

    @property
    def changed_s(self) -> float:
        """time.monotonic() when it last told of progress, or of another thing that it does."""
        return self._changed_s

    @property
    def stuck(self) -> str | None:
        """What is wrong with one that lives, and gets no further."""
        late = time.monotonic() - self._changed_s > self._progress_s
        if self.doing is Doing.BUSY and late and self.state != "ended":
            return f"busy without progress for {self._progress_s:g} s"
        return None

    def end(self) -> None:
        """Leave cleanly."""
        self._close(_END)

    def lose(self, rank: int, reason: str) -> None:
        """Leave, and say why, as far as the other listens."""
        self._close(_LOST + msgspec.msgpack.encode(Loss(rank, reason)))

    def _close(self, last: bytes) -> None:
        with contextlib.suppress(PeerLost):  # it has left before
            self.link.try_send(last)
        self.link.close()
        self.gone.set()

    def _take(self, frame: bytes) -> None:
        kind, body = frame[:1], frame[1:]
        if kind == _DATA:
            self._inbox.append(body)
            if len(self._inbox) > MESSAGES_MAX:
                raise PeerLost(f"has sent {MESSAGES_MAX} messages that nobody has taken")
        elif kind == _BEAT:
            progress, doing = _BEAT_BODY.unpack(body)
            if (progress, doing) != self._beat:
                self._beat, self._changed_s = (progress, Doing(doing)), time.monotonic()
        elif kind == _END:
            self.state = "ended"
        elif kind == _LOST:
            raise OtherToldLoss(msgspec.msgpack.decode(body, type=Loss))
