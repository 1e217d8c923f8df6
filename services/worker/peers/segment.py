"""Memory that processes of one host share by passing a descriptor."""

from typing import Self


class Segment:
    """``byte_count`` bytes at ``buffer``. ``fd`` may be passed over a local PeerLink."""

    fd: int
    byte_count: int
    buffer: memoryview

    @classmethod
    def create(cls, byte_count: int, name: str) -> Self: ...

    @classmethod
    def map(cls, fd: int, byte_count: int, *, writable: bool = False) -> Self:
        """Owns ``fd`` from here on, also where it raises (ValueError: shorter than that)."""
        ...

    def close(self) -> None: ...
