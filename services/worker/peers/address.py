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
    path: str  # of the Unix socket, for callers on the same host; "@name" is no file
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
        """Whether its Unix socket may be reached from here: containers share a host, and not
        always files, or names."""
        named = self.path.startswith("@")
        return self.host_id == host_id() and (named or Path(self.path).exists())

    @property
    def place(self) -> str:
        """The Unix socket as the kernel calls it."""
        return place_of(self.path)


def place_of(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


@functools.cache
def host_id() -> str:
    """One string for each running host; a reboot makes another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()
