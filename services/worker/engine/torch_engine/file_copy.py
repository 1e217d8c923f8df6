"""Copies into an arena through the files behind it.

A page of a file that is written as a whole is taken as it comes; through a mapping each fresh page
is a fault of its own and filled with zeros first, which takes longer than the copy.
"""

import ctypes
import os

import numpy as np
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena
from shared.errors import EngineFailed

RUNS_MAX = 1024
"""Runs of bytes in one call of the kernel's; it takes no more (IOV_MAX)."""

_RUN_BYTES_MIN = 512
"""Shorter ones are better gathered by torch."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
_libc.pwritev.restype = ctypes.c_ssize_t


def written(arena: Arena, target: Tensor, values: Tensor) -> bool:
    """Copy ``values`` to ``target``, of the same shape; False, and nothing is done, where there is
    no file, or the bytes do not lie so. Raises EngineFailed where memory is refused."""
    runs = _runs(values)
    if runs is None or not target.is_contiguous() or target.dtype != values.dtype:
        return False
    place = arena.place(target)
    if place is None or place.block.segment is None:
        return False
    fd, offset = place.block.segment.fd, place.offset
    count, run_bytes, stride_bytes = runs
    for first in range(0, count, RUNS_MAX):
        starts = np.arange(first, min(first + RUNS_MAX, count), dtype=np.uint64)
        starts = starts * np.uint64(stride_bytes) + np.uint64(values.data_ptr())
        _write(fd, offset + first * run_bytes, starts, run_bytes)
    return True


def _runs(values: Tensor) -> tuple[int, int, int] | None:
    """How many runs of bytes, how long each is, and from one to the next."""
    size = values.element_size()
    if values.device.type != "cpu" or not values.numel():
        return None
    if values.is_contiguous():
        return 1, values.nbytes, 0
    if values.dim() != 2 or values.stride(1) != 1:  # noqa: PLR2004  # a matrix, of which columns
        return None
    run_bytes = values.shape[1] * size
    return None if run_bytes < _RUN_BYTES_MIN else (len(values), run_bytes, values.stride(0) * size)


def _write(
    fd: int, offset: int, starts: np.ndarray[tuple[int], np.dtype[np.uint64]], run_bytes: int
) -> None:
    """The runs one after another. A call may write less than it was told."""
    total, done = len(starts) * run_bytes, 0
    while done < total:
        run, inner = divmod(done, run_bytes)
        vector = np.empty((len(starts) - run, 2), dtype=np.uint64)  # struct iovec: base, length
        vector[:, 0], vector[:, 1] = starts[run:], run_bytes
        vector[0] += np.array((inner, -inner)).astype(np.uint64)
        count = _libc.pwritev(fd, vector.ctypes.data, len(vector), offset + done)
        if count <= 0:
            reason = os.strerror(ctypes.get_errno())
            raise EngineFailed(f"{total - done} bytes cannot be written to memory: {reason}")
        done += count
