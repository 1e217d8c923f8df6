"""The address of a worker's PeerServer: one string, for the authenticated bus only."""

import functools
import platform
from pathlib import Path

import msgspec

from shared.errors import PeerLost


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """``secret`` (hexadecimal) opens the server to whoever was told the address."""

    worker_id: str
    host_id: str
    path: str  # of the Unix socket, for callers on the same host
    host: str
    port: int
    secret: str

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, address: str) -> "PeerAddress":
        """Raises PeerLost: whoever it was, nobody can reach it."""
        try:
            return msgspec.json.decode(address, type=cls)
        except msgspec.DecodeError as error:
            raise PeerLost(f"the address of a worker cannot be read: {error}") from error

    @property
    def same_host(self) -> bool:
        """Whether its Unix socket can be reached from here: containers share a host, not files."""
        return self.host_id == host_id() and Path(self.path).exists()


@functools.cache
def host_id() -> str:
    """One string for each running host; a reboot makes another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()
