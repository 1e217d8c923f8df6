"""Where a worker is reached by its peers."""

from collections.abc import Callable
from pathlib import Path

from services.worker.peers.link import PeerLink

Handler = Callable[[PeerLink, bytes], None]


class PeerServer:
    address: str

    def __init__(
        self,
        *,
        worker_id: str,
        host: str = "127.0.0.1",
        port: int = 0,
        folder: Path | None = None,
        connections_max: int = 256,
    ) -> None: ...

    def offer(self, topic: str, handler: Handler) -> None: ...
    def withdraw(self, topic: str, handler: Handler | None = None) -> None: ...
    def close(self) -> None: ...
