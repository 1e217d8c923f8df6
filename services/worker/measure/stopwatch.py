"""Wall time without the time in which this thread waited for a CPU that others had.

A profile is of the engine, not of what else the machine happens to do. Linux counts, for each
thread, how long it stood ready without running (``schedstat``, second number, nanoseconds); taken
off the wall time, a busy neighbour costs a measurement little more than its cache lines. Where
the kernel does not tell, it is plain wall time. An engine that computes in several threads still
waits for those of them that were kept waiting: give it one, or a quiet machine.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

_WAITED = Path("/proc/thread-self/schedstat")
_NS = 1e-9


def stopwatch(source: Path = _WAITED) -> Callable[[], float]:
    """A clock in seconds for the calling thread."""
    try:
        descriptor = os.open(source, os.O_RDONLY)  # for as long as the process lives
        _waited_s(descriptor)
    except (OSError, ValueError, IndexError):
        return time.perf_counter

    def read() -> float:
        return time.perf_counter() - _waited_s(descriptor)

    return read


def _waited_s(descriptor: int) -> float:
    return int(os.pread(descriptor, 128, 0).split()[1]) * _NS
