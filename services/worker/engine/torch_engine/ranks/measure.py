"""Measures the groups of ranks on this host: `python -m` and this module's name.

Prints a JSON line for each kind, operation and size. Ranks are processes, each with one thread.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch

from services.worker.engine.torch_engine.ranks.connect import Groups, connect_groups
from services.worker.engine.torch_engine.ranks.session import FollowerSession, LeaderSession
from services.worker.peers.server import PeerServer
from shared.hardware import Parallelism
from shared.placement.sheets import Rank

RANKS = 2
SIZES_BYTES = (4 << 10, 64 << 10, 512 << 10, 4 << 20)
ROUNDS = 300
WAIT_S = 60.0
FLOAT_BYTES = 4


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Of ``rounds`` calls; one of ``send`` is there and back, so half of its time is given."""

    kind: str
    operation: str
    ranks: int
    size_bytes: int
    rounds: int
    time_us_p50: float
    time_us_p99: float
    gigabytes_per_s: float


def measure(groups: Groups, rank: int, operation: str, size_bytes: int) -> Figure:
    tensor = torch.ones(size_bytes // FLOAT_BYTES)
    operations: dict[str, tuple[Callable[[], None], float]] = {
        "all_reduce": (lambda: groups.tp.all_reduce(tensor.zero_()), 1.0),
        "send": (lambda: _there_and_back(groups, rank, tensor), 0.5),
    }
    call, share = operations[operation]
    times_s: list[float] = []
    for turn in range(ROUNDS + ROUNDS // 10):
        started_s = time.perf_counter()
        call()
        if turn >= ROUNDS // 10:  # after warming up
            times_s.append((time.perf_counter() - started_s) * share)
    middle_s = statistics.median(times_s)
    return Figure(
        kind=groups.kind,
        operation=operation,
        ranks=RANKS,
        size_bytes=size_bytes,
        rounds=ROUNDS,
        time_us_p50=round(middle_s * 1e6, 1),
        time_us_p99=round(statistics.quantiles(times_s, n=100)[98] * 1e6, 1),
        gigabytes_per_s=round(size_bytes / middle_s / 1e9, 3),
    )


def _there_and_back(groups: Groups, rank: int, tensor: torch.Tensor) -> None:
    if rank == 0:
        groups.pipe.send(tensor, 1)
        groups.pipe.recv(tensor, 1)
    elif rank == 1:
        groups.pipe.recv(tensor, 0)
        groups.pipe.send(tensor, 0)


def run_rank(number: int, kind: Literal["shm", "gloo"], addresses: Any) -> None:  # noqa: ANN401  # a pipe
    """One rank's process. ``addresses``: where it tells its own, and is told all."""
    torch.set_num_threads(1)
    server = PeerServer(worker_id=f"w{number}")
    addresses.send(server.address)
    told: list[str] = addresses.recv()
    session: LeaderSession | FollowerSession
    if number == 0:
        session = LeaderSession(server, replica_id="measured", epoch=1, size=len(told))
        session.gather(WAIT_S)
    else:
        session = FollowerSession.join(
            told[0], replica_id="measured", epoch=1, rank=number, timeout_s=WAIT_S
        )
    rank = Rank.of(number, Parallelism(tp=len(told), pp=1))
    groups = connect_groups(
        session,
        rank=rank,
        server=server,
        addresses=told,
        device=torch.device("cpu"),
        kind=kind,
    )
    for operation in ("all_reduce", "send"):
        for size_bytes in SIZES_BYTES:
            figure = measure(groups, number, operation, size_bytes)
            if number == 0:
                sys.stdout.buffer.write(msgspec.json.encode(figure) + b"\n")
                sys.stdout.flush()
    if isinstance(session, FollowerSession):
        session.recv()  # the leader leaves first
    session.close()
    groups.close()
    server.close()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    for kind in ("shm", "gloo"):
        pipes = [context.Pipe() for _ in range(RANKS)]
        ranks = [
            context.Process(target=run_rank, args=(number, kind, pipe[1]))
            for number, pipe in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        addresses = [pipe[0].recv() for pipe in pipes]
        for pipe in pipes:
            pipe[0].send(addresses)
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
