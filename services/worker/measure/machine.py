"""Roughly how fast the machine moves bytes: what switching and reloading are reckoned from.

Virtual GPUs are processes on one machine, so copies between them, and to the node's memory, are
copies in memory, and the network between nodes is a socket pair. The disk is read as an engine
start reads it: the checkpoint's own files, which the page cache is asked to forget before.
"""

import os
import socket
import threading
import time
from pathlib import Path

import numpy as np

from shared.cost.profile import Link

COPY_BYTES = 64 << 20
REPEATS = 5
_PIECE = 1 << 20
_READ_BYTES_MAX = 2 << 30  # of a larger checkpoint, the first of it


def memory_link() -> Link:
    """The best of some copies of memory to memory; the latency is that of a very short one."""
    source, target = (np.zeros(COPY_BYTES, dtype=np.uint8) for _ in range(2))
    source += 1  # a page that was never written is no memory yet
    long_s = min(_copy_s(source, target) for _ in range(REPEATS))
    short_s = min(_copy_s(source[:64], target[:64]) for _ in range(100))
    return _link(COPY_BYTES, long_s, short_s)


def _copy_s(source: "np.typing.NDArray[np.uint8]", target: "np.typing.NDArray[np.uint8]") -> float:
    began_s = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began_s


def socket_link() -> Link:
    """Bytes through a local socket from one thread to another; the latency is half a round trip."""
    long_s = min(_send_s(COPY_BYTES, answers=1) for _ in range(REPEATS))
    trips = 100
    short_s = _send_s(trips, answers=trips) / trips / 2
    return _link(COPY_BYTES, long_s, short_s)


def _send_s(byte_count: int, *, answers: int) -> float:
    """Seconds until ``byte_count`` bytes, in as many parts as ``answers``, have arrived, each part
    acknowledged by one byte before the next is sent."""
    near, far = socket.socketpair()
    part = byte_count // answers

    def receive() -> None:
        room = memoryview(bytearray(_PIECE))
        for _ in range(answers):
            left = part
            while left:
                left -= far.recv_into(room, min(left, _PIECE))
            far.sendall(b"!")

    receiver = threading.Thread(target=receive, daemon=True)
    data = bytes(part)
    with near, far:
        receiver.start()
        began_s = time.perf_counter()
        for _ in range(answers):
            near.sendall(data)
            near.recv(1)
        taken_s = time.perf_counter() - began_s
        receiver.join()
    return taken_s


def disk_link(files: list[Path]) -> Link:
    """Reads ``files`` once, from the disk if the system lets go of its copies of them."""
    read = 0
    first_s = None
    began_s = time.perf_counter()
    room = memoryview(bytearray(_PIECE))
    for path in files:
        with path.open("rb", buffering=0) as file:
            _forget(file.fileno())
            while read < _READ_BYTES_MAX and (count := file.readinto(room)):
                read += count
                first_s = first_s or time.perf_counter() - began_s
    taken_s = time.perf_counter() - began_s
    latency_s = min(first_s or 0.0, taken_s / 2)
    return _link(max(read, 1), taken_s, latency_s)


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):  # elsewhere the cache is measured, which is at least no worse
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _link(byte_count: int, taken_s: float, latency_s: float) -> Link:
    moving_s = max(taken_s - latency_s, taken_s / 2)
    return Link(
        bytes_per_s=float(round(byte_count / moving_s)), latency_s=float(f"{latency_s:.2e}")
    )
