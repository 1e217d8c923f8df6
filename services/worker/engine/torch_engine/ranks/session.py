"""The control channel of one replica's ranks (signatures; see leader and follower)."""

from collections.abc import Callable
from typing import Protocol, Self

from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.peers.server import PeerServer


class RankSession(Protocol):
    """What both ends have. All blocking calls raise RankLost once the session is lost."""

    @property
    def lost(self) -> RankLost | None: ...
    def progress(self) -> None:
        """The caller's work goes on; call it per layer. Costs an addition."""
    def busy(self, busy: bool) -> None:
        """While busy, progress is expected within progress_s."""
    def on_lost(self, callback: Callable[[RankLost], None]) -> None: ...
    def close(self) -> None: ...


class LeaderSession(RankSession):
    def __init__(
        self, server: PeerServer, *, replica_id: str, epoch: int, size: int,
        stall_s: float = 2.0, progress_s: float = 2.0,
    ) -> None: ...
    def gather(self, timeout_s: float) -> None: ...
    def broadcast(self, payload: bytes) -> None: ...
    def send(self, rank: int, payload: bytes) -> None: ...
    def recv(self, rank: int, timeout_s: float) -> bytes: ...


class FollowerSession(RankSession):
    @classmethod
    def join(
        cls, address: str, *, replica_id: str, epoch: int, rank: int, timeout_s: float,
        stall_s: float = 2.0, progress_s: float = 2.0,
    ) -> Self: ...
    def recv(self) -> bytes | None:
        """None: the leader has closed the session cleanly."""
    def send(self, payload: bytes) -> None: ...
