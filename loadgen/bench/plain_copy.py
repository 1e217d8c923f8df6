"""What a plain copy between two processes reaches here: the measure for moving weights.

One process fills shared memory, another copies it into memory of its own. No protocol, no pieces.
"""

import multiprocessing
from multiprocessing.shared_memory import SharedMemory
from time import perf_counter

import numpy as np

BYTES = 256 << 20
ROUNDS = 5


def plain_copy_bytes_per_s(byte_count: int = BYTES, rounds: int = ROUNDS) -> float:
    """The median of ``rounds`` copies into memory that was never touched, as a new shard's is."""
    shared = SharedMemory(create=True, size=byte_count)
    try:
        writer = multiprocessing.get_context("spawn").Process(target=_fill, args=(shared.name,))
        writer.start()
        writer.join()
        source = np.ndarray((byte_count,), dtype=np.uint8, buffer=shared.buf)
        rates: list[float] = []
        for _ in range(rounds):
            target = np.empty(byte_count, dtype=np.uint8)
            began_s = perf_counter()
            np.copyto(target, source)
            rates.append(byte_count / (perf_counter() - began_s))
        del source
    finally:
        shared.close()
        shared.unlink()
    return sorted(rates)[len(rates) // 2]


def _fill(name: str) -> None:
    shared = SharedMemory(name=name)
    view = np.ndarray((shared.size,), dtype=np.uint8, buffer=shared.buf)
    view[:] = np.random.default_rng(0).integers(0, 256, size=shared.size, dtype=np.uint8)
    del view
    shared.close()


if __name__ == "__main__":
    print(f"{plain_copy_bytes_per_s() / 1e9:.2f} GB/s")
