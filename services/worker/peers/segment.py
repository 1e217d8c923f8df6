"""Memory that processes of one host share by passing a descriptor.

Pages are committed as they are first touched, and given back with the last mapping.
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from typing import Self


class Segment:
    """``byte_count`` bytes at ``buffer``, zero at first. ``fd`` may be sent over a local PeerLink.

    Tensors made over ``buffer`` keep the memory alive beyond ``close``; it ends with the last.
    """

    def __init__(self, fd: int, byte_count: int, *, writable: bool) -> None:
        """Owns ``fd``; use create or map."""
        self.fd, self.byte_count = fd, byte_count
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map = mmap.mmap(fd, byte_count, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(fd)
            raise
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, byte_count: int, name: str) -> Self:
        """``name`` is what /proc shows, nothing more. Raises OSError where memory is refused."""
        if byte_count <= 0:
            raise ValueError(f"byte_count = {byte_count}: a segment has at least one byte")
        fd = _anonymous_file(name)
        try:
            os.ftruncate(fd, byte_count)
            _forbid_shrinking(fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, byte_count, writable=True)

    @classmethod
    def map(cls, fd: int, byte_count: int, *, writable: bool = False) -> Self:
        """Map a received descriptor. Owns ``fd`` from here on, also where it raises: ValueError if
        the file is shorter than ``byte_count``, which would kill whoever reads beyond its end."""
        held = os.fstat(fd).st_size
        if not 0 < byte_count <= held:
            os.close(fd)
            raise ValueError(f"byte_count = {byte_count}: the segment has {held} bytes")
        return cls(fd, byte_count, writable=writable)

    def close(self) -> None:
        """Idempotent. The mapping outlives it for as long as views of ``buffer`` are in use."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):  # views in use: unmapped when the last one goes
            self.buffer.release()
            self._map.close()
        self.buffer = memoryview(b"")
        del self._map


def _anonymous_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, path = tempfile.mkstemp(prefix=name.replace("/", "-"))
    Path(path).unlink()
    return fd


def _forbid_shrinking(fd: int) -> None:
    """A mapped page that its maker has cut off would kill whoever reads it."""
    seal, shrink = getattr(fcntl, "F_ADD_SEALS", None), getattr(fcntl, "F_SEAL_SHRINK", None)
    if hasattr(os, "memfd_create") and seal is not None and shrink is not None:
        fcntl.fcntl(fd, seal, shrink)
