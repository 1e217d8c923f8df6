"""One link between two workers: messages, descriptors and bulk bytes, in order."""

from collections.abc import Sequence
from typing import Any

from shared.errors import PeerLost

Buffer = Any


class PeerRefused(PeerLost):
    """The peer is there and says no; the text holds its words."""


class PeerLink:
    local: bool

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None: ...
    def recv(self, timeout_s: float | None = None) -> bytes: ...
    def recv_fds(self, timeout_s: float | None = None) -> tuple[bytes, list[int]]: ...
    def send_bulk(self, buffer: Buffer) -> None: ...
    def recv_bulk_into(self, buffer: Buffer, timeout_s: float | None = None) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


def connect(
    address: str, topic: str, hello: bytes = b"", *, timeout_s: float, force_tcp: bool = False
) -> PeerLink: ...


def ask(address: str, topic: str, hello: bytes = b"", *, timeout_s: float) -> bytes: ...
