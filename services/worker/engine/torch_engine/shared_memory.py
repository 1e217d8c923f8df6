"""Memory that another process can map: memfd files, and tensors over mappings of them.

Pages of such a file are there from the first touch on, zeroed, and go when its last descriptor and
its last mapping go, in whichever process. Python's own mmap would keep a descriptor of its own
for each mapping, and a model has hundreds: the C library is called instead.
"""

import ctypes
import fcntl
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.errors import EngineFailed

_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_FAILED = ctypes.c_void_p(-1).value
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_BLOCK_BYTES = 512  # in which fstat counts what is allocated

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class MemorySegment:
    """One memfd file. The descriptor is closed with the last reference to this object, so that
    two owners (an old replica and the one that takes a tensor over unchanged) need not agree."""

    def __init__(self, fd: int) -> None:
        """Takes ``fd`` over."""
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self._closed = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, name: str) -> "MemorySegment":
        """Nobody can ever cut it off: that would kill whoever reads it."""
        fd = os.memfd_create(f"oserve-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(fd)

    @property
    def committed_bytes(self) -> int:
        """Pages that have been touched."""
        return os.fstat(self.fd).st_blocks * _BLOCK_BYTES

    def extend(self, size: int) -> int:
        """Append ``size`` bytes of zeros; their offset, which begins a page."""
        offset = -(-self.size // _PAGE_BYTES) * _PAGE_BYTES
        self.size = offset + size
        os.ftruncate(self.fd, self.size)
        return offset

    def map(self, *, offset: int, size: int, writable: bool) -> Tensor:
        """``size`` bytes from ``offset``, the begin of a page, as a tensor of bytes; unmapped with
        the last tensor over it. Raises EngineFailed if the address space is exhausted."""
        assert size > 0, "nothing to map"
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, protection, _MAP_SHARED, self.fd, offset)
        if address == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise EngineFailed(f"{size} bytes of a memory segment cannot be mapped: {reason}")
        memory: ctypes.Array[Any] = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(memory, _libc.munmap, address, size).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch


def viewed(
    memory: Tensor,
    dtype: torch.dtype,
    *,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """A tensor at ``offset`` bytes of ``memory``, a mapping; ``strides`` count elements."""
    return torch.as_strided(memory.view(dtype), shape, strides, offset // dtype.itemsize)
