"""Both ends of a replica's control channel: rank 0 leads, each other rank has a link to it."""

import time
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from services.worker.engine.torch_engine.ranks.channel import Doing, RankChannel
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.membership import (
    STALL_S,
    SUSPICIOUS_S,
    RankSession,
)
from services.worker.peers.link import PeerLink, connect
from services.worker.peers.server import PeerServer
from shared.errors import PeerLost

JOIN_RETRY_S = 0.05
ANSWER_S = 2.0  # for a leader that is there to let a rank in; one that stands still is asked again
LOOK_S = 0.1  # how often who waits for others is asked whether to go on


class Join(msgspec.Struct, frozen=True, array_like=True):
    """A follower's hello."""

    rank: int


def go_on() -> None:
    """Nobody wants to give up."""


def name_of(replica_id: str, epoch: int) -> str:
    return f"{replica_id}/{epoch}"


class LeaderSession(RankSession):
    """Rank 0's end. Followers may join from now on, the latest join of a rank counts."""

    def __init__(
        self,
        server: PeerServer,
        *,
        replica_id: str,
        epoch: int,
        size: int,
        stall_s: float = STALL_S,
        progress_s: float = STALL_S,
    ) -> None:
        name = name_of(replica_id, epoch)
        super().__init__(name, 0, stall_s=stall_s, progress_s=progress_s)
        self._server, self._topic = server, f"join/{name}"
        self.size = size
        self._complete = False
        self._seen, self._seen_s = (0, Doing.IDLE), time.monotonic()
        server.offer(self._topic, self._on_join)
        self._watching.start()

    def gather(self, timeout_s: float, between: Callable[[], None] = go_on) -> None:
        """Wait until all ranks have joined; later joins are refused. RankLost names the first that
        has not. ``between`` is called every LOOK_S, and raises to give up."""
        deadline_s = time.monotonic() + timeout_s
        with self._state:
            while missing := [rank for rank in range(1, self.size) if rank not in self._channels]:
                if self.lost is not None or self._closing.is_set():
                    raise self._lost_or(missing[0], "has not joined")
                if (wait_s := deadline_s - time.monotonic()) <= 0:
                    raise RankLost(missing[0], f"has not joined within {timeout_s:g} s")
                between()
                self._state.wait(min(wait_s, LOOK_S))
            self._complete = True
        self._server.withdraw(self._topic, self._on_join)

    def broadcast(self, payload: bytes) -> None:
        """To all followers, in the order of their ranks."""
        for rank in range(1, self.size):
            self.send(rank, payload)

    def send(self, rank: int, payload: bytes) -> None:
        channel = self._channel(rank)
        with self._with(channel):
            channel.send(payload)

    def recv(self, rank: int, timeout_s: float) -> bytes:
        """The next message of ``rank``; one that does not come in time loses the session."""
        channel = self._channel(rank)
        with self._with(channel):
            payload = channel.recv(time.monotonic() + timeout_s)
            if payload is None:
                raise PeerLost("has left")
            return payload

    def close(self) -> None:
        self._server.withdraw(self._topic, self._on_join)
        super().close()

    def _channel(self, rank: int) -> RankChannel:
        if (lost := self.lost) is not None:
            raise lost
        assert self._complete, "gather first"
        return self._channels[rank]

    def _on_join(self, link: PeerLink, hello: bytes) -> None:
        """In the connection's thread, which holds the link open for the session."""
        rank = msgspec.msgpack.decode(hello, type=Join).rank
        channel = RankChannel(rank, link, stall_s=self._stall_s, progress_s=self._progress_s)
        former: RankChannel | None = None
        with self._state:
            welcome = 0 < rank < self.size and not (
                self._complete or self._closing.is_set() or self._loss is not None
            )
            if welcome:
                former = self._channels.get(rank)
                link.send(b"")
                self._channels[rank] = channel
                self._state.notify_all()
        if not welcome:
            link.refuse(f"rank {rank} cannot join {self._topic}: it is complete, or closed")
            return
        if former is not None:
            former.end()
        channel.gone.wait()

    def _watch_all(self, channels: Sequence[RankChannel]) -> None:
        """Ranks that wait for each other would do so for ever, and none of them is stuck."""
        now_s, mine = time.monotonic(), (self._progress, self._doing)
        if mine != self._seen:
            self._seen, self._seen_s = mine, now_s
        doing = {self._doing, *(channel.doing for channel in channels)}
        changed_s = max(self._seen_s, *(channel.changed_s for channel in channels), 0.0)
        waiting = Doing.WAITING in doing and Doing.BUSY not in doing
        silent = any(channel.silence_s > SUSPICIOUS_S for channel in channels)
        if self._complete and waiting and not silent and now_s - changed_s > self._progress_s:
            self.lose(0, f"all ranks wait for each other for {self._progress_s:g} s")

    def _ended(self, channel: RankChannel) -> None:
        self._troubled(channel, "has left")

    def _troubled(self, channel: RankChannel, trouble: str) -> None:
        """Before the ranks are complete, one that is gone may come again."""
        with self._state:
            if self._channels.get(channel.rank) is not channel:
                return
            if not self._complete:
                del self._channels[channel.rank]
        if self._complete:
            self.lose(channel.rank, trouble)
        else:
            channel.end()


class FollowerSession(RankSession):
    """Any other rank's end; made by ``join``."""

    def __init__(
        self, link: PeerLink, name: str, rank: int, *, stall_s: float, progress_s: float
    ) -> None:
        super().__init__(name, rank, stall_s=stall_s, progress_s=progress_s)
        self.local = link.local  # on one host with the leader
        self._leader = RankChannel(0, link, stall_s=stall_s, progress_s=progress_s)
        self._channels[0] = self._leader
        self._watching.start()

    @classmethod
    def join(  # noqa: PLR0913  # the leader's, and who asks
        cls,
        address: str,
        *,
        replica_id: str,
        epoch: int,
        rank: int,
        timeout_s: float,
        stall_s: float = STALL_S,
        progress_s: float = STALL_S,
        between: Callable[[], None] = go_on,
    ) -> Self:
        """Ask the leader until it lets this rank in; RankLost after ``timeout_s``. ``between`` is
        called before each question, and raises to give up."""
        deadline_s, hello = time.monotonic() + timeout_s, msgspec.msgpack.encode(Join(rank))
        name = name_of(replica_id, epoch)
        while True:
            between()
            wait_s = min(ANSWER_S, max(0.0, deadline_s - time.monotonic()))
            try:
                link = connect(address, f"join/{name}", hello, timeout_s=wait_s)
                link.recv(wait_s)  # let in, or PeerRefused
            except PeerLost as error:
                if time.monotonic() + JOIN_RETRY_S > deadline_s:
                    raise RankLost(0, f"cannot join it within {timeout_s:g} s: {error}") from error
                time.sleep(JOIN_RETRY_S)
            else:
                return cls(link, name, rank, stall_s=stall_s, progress_s=progress_s)

    def recv(self) -> bytes | None:
        """The leader's next message, however long it takes; None once either end is closed."""
        if (lost := self.lost) is not None:
            raise lost
        try:
            with self._with(self._leader):
                return self._leader.recv(None)
        except RankLost:
            if self._closing.is_set() and self._loss is None:
                return None
            raise

    def send(self, payload: bytes) -> None:
        if (lost := self.lost) is not None:
            raise lost
        with self._with(self._leader):
            self._leader.send(payload)
