"""What both ends of a replica's control channel do: keep each other alive, or lose each other.

A thread in each process sends heartbeats and watches the others', so a rank that is dead, stopped
or stuck is noticed within ``stall_s`` while its peers compute. The session is then lost for all of
them: links are closed, which wakes whoever waits, and all calls raise RankLost.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Sequence

from services.worker.engine.torch_engine.ranks.channel import Doing, OtherToldLoss, RankChannel
from services.worker.engine.torch_engine.ranks.lost import RankLost
from shared.errors import PeerLost

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
STALL_S = 1.75
"""With the heartbeat that was sent last, and the one at which it is noticed, that is within 2 s."""

SUSPICIOUS_S = 3 * HEARTBEAT_S
"""Of silence: as long as one rank is as silent as that, none is called stuck. It may wait for the
silent one, which is lost soon."""

CLOSE_S = 2.0  # for the watching thread to return

LostCallback = Callable[[RankLost], None]


class RankSession:
    """What leader and follower have in common. ``stall_s``: after how long without a heartbeat, and
    ``progress_s``: after how long busy without progress a rank is lost."""

    def __init__(self, name: str, rank: int, *, stall_s: float, progress_s: float) -> None:
        """``name`` is the same for all ranks, and for no other replica or epoch."""
        self.name, self.rank = name, rank
        self._stall_s, self._progress_s = stall_s, progress_s
        self._state = threading.Condition()
        self._channels: dict[int, RankChannel] = {}
        self._callbacks: list[LostCallback] = []
        self._loss: RankLost | None = None
        self._progress, self._busy, self._waiting = 0, False, False
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    @property
    def lost(self) -> RankLost | None:
        """Why the session is lost, if it is; a new error each time, to be raised."""
        loss = self._loss
        return None if loss is None else RankLost(loss.rank, loss.reason)

    def progress(self) -> None:
        """The caller's work goes on; call it for each layer. The next heartbeat tells."""
        self._progress += 1

    def busy(self, busy: bool) -> None:
        """While busy, progress is expected within the others' ``progress_s``."""
        self._busy = busy
        self._progress += 1

    def waiting(self, waiting: bool) -> None:
        """While this rank waits for another one of its replica, no progress is expected of it,
        busy or not. Some other rank is busy then: when none is, for ``progress_s``, all are lost.
        """
        self._waiting = waiting
        self._progress += 1

    def on_lost(self, callback: LostCallback) -> None:
        """Call it once when the session is lost, from any thread; at once if it is already."""
        with self._state:
            if self._loss is None:
                self._callbacks.append(callback)
                return
        callback(self._loss)

    def close(self) -> None:
        """Idempotent, from any thread: the others see a clean end."""
        with self._state:
            self._closing.set()
            channels = list(self._channels.values())
            self._callbacks.clear()
        for channel in channels:
            channel.end()
        if self._watching.is_alive() and self._watching is not threading.current_thread():
            self._watching.join(CLOSE_S)

    def lose(self, rank: int, reason: str) -> None:
        """Give the session up, for all ranks; the first reason stands."""
        with self._state:
            if self._loss is not None or self._closing.is_set():
                return
            self._loss = loss = RankLost(rank, reason)
            channels, callbacks = list(self._channels.values()), list(self._callbacks)
            self._callbacks.clear()
            self._state.notify_all()
        log.warning("ranks.lost", extra={"rank": rank, "reason": reason})
        for channel in channels:
            channel.lose(rank, reason)
        for callback in callbacks:
            callback(loss)

    @contextlib.contextmanager
    def _with(self, channel: RankChannel) -> Generator[None]:
        """Calls to another rank: what goes wrong in them loses the session."""
        try:
            yield
        except OtherToldLoss as told:
            self.lose(told.loss.rank, told.loss.reason)
            raise self._lost_or(told.loss.rank, told.loss.reason) from None
        except PeerLost as error:
            self.lose(channel.rank, str(error))
            raise self._lost_or(channel.rank, str(error)) from error

    def _lost_or(self, rank: int, reason: str) -> RankLost:
        return self.lost or RankLost(rank, f"{reason} (this rank has closed its session)")

    def _watch(self) -> None:
        while self._loss is None and not self._closing.wait(HEARTBEAT_S):
            with self._state:
                channels = list(self._channels.values())
            for look in (self._hear, self._silent, self._stuck):
                for channel in channels:
                    self._watch_one(channel, look)
            self._watch_all(channels)

    def _hear(self, channel: RankChannel) -> str | None:
        channel.beat(self._progress, self._doing)
        channel.hear()
        if channel.state == "ended":
            self._ended(channel)
        return None

    def _silent(self, channel: RankChannel) -> str | None:
        return channel.silent

    def _stuck(self, channel: RankChannel) -> str | None:
        others = [other for other in list(self._channels.values()) if other is not channel]
        if any(other.silence_s > SUSPICIOUS_S for other in others):
            return None
        return channel.stuck

    def _watch_one(self, channel: RankChannel, look: Callable[[RankChannel], str | None]) -> None:
        """``look`` says what is wrong with it, or raises PeerLost."""
        if self._loss is not None:
            return
        try:
            trouble = look(channel)
        except OtherToldLoss as told:
            self.lose(told.loss.rank, told.loss.reason)
            return
        except PeerLost as error:
            trouble = str(error)
        if trouble is not None and channel.state != "ended":
            self._troubled(channel, trouble)

    @property
    def _doing(self) -> Doing:
        if self._waiting:
            return Doing.WAITING
        return Doing.BUSY if self._busy else Doing.IDLE

    def _watch_all(self, channels: Sequence[RankChannel]) -> None:
        """The leader alone hears of all ranks; see LeaderSession."""

    def _ended(self, channel: RankChannel) -> None:
        """The other rank has left cleanly."""

    def _troubled(self, channel: RankChannel, trouble: str) -> None:
        self.lose(channel.rank, trouble)
