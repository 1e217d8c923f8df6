"""All kinds of rank groups keep one contract; here the ranks are threads, each with all it has."""

import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

pytest.importorskip("torch", reason="the torch extra is not installed")

import torch

from services.worker.engine.torch_engine.ranks import ring
from services.worker.engine.torch_engine.ranks.connect import (
    GroupKind,
    Groups,
    Place,
    connect_groups,
    fitting_kind,
)
from services.worker.engine.torch_engine.ranks.group import LoneGroup
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.session import (
    FollowerSession,
    LeaderSession,
)
from services.worker.engine.torch_engine.ranks.shared_memory import SharedMemoryGroup
from services.worker.peers.server import PeerServer
from shared.hardware import Parallelism
from shared.placement.sheets import Rank

pytestmark = pytest.mark.torch

WAIT_S = 30.0
CPU = torch.device("cpu")
KINDS: tuple[GroupKind, ...] = ("shm", "gloo")


@dataclass(frozen=True)
class Seat:
    """One rank in its thread."""

    rank: Rank
    session: LeaderSession | FollowerSession
    groups: Groups


Work = Callable[[Seat], object]


def run_ranks(kind: GroupKind, *, tp: int, pp: int = 1, work: Work) -> list[object]:
    """What ``work`` returns on each rank; all are closed when the last is done."""
    size = tp * pp
    with ExitStack() as stack, ThreadPoolExecutor(size) as pool:
        servers = [PeerServer(worker_id=f"w{number}") for number in range(size)]
        for server in servers:
            stack.callback(server.close)
        done = threading.Barrier(size)

        def run(number: int) -> object:
            with seated(kind, servers, number, Parallelism(tp=tp, pp=pp)) as seat:
                result = work(seat)
                done.wait(WAIT_S)
                return result

        return list(pool.map(run, range(size)))


@contextmanager
def seated(
    kind: GroupKind, servers: list[PeerServer], number: int, shape: Parallelism
) -> Generator[Seat]:
    rank, server = Rank.of(number, shape), servers[number]
    session: LeaderSession | FollowerSession
    if number == 0:
        session = LeaderSession(server, replica_id="r", epoch=1, size=len(servers))
        session.gather(WAIT_S)
    else:
        session = FollowerSession.join(
            servers[0].address, replica_id="r", epoch=1, rank=number, timeout_s=WAIT_S
        )
    addresses = [server.address for server in servers]
    groups = connect_groups(
        session, rank=rank, server=server, addresses=addresses, device=CPU, kind=kind
    )
    yield Seat(rank, session, groups)
    groups.close()
    groups.close()
    session.close()


def values(number: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_reduce_sums_in_the_order_of_ranks(kind: GroupKind, size: int) -> None:
    """Ranks would decode different tokens, or other ones than the same shape elsewhere."""
    counts = (1, 1000, 70_000, 300_001, 0)

    def work(seat: Seat) -> list[torch.Tensor]:
        results: list[torch.Tensor] = []
        for dtype in (torch.float32, torch.bfloat16):
            for count in counts:
                tensor = values(seat.rank.number, count, dtype)
                seat.groups.tp.all_reduce(tensor)
                results.append(tensor)
        return results

    expected: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        for count in counts:
            total = values(0, count, dtype)
            for number in range(1, size):
                total += values(number, count, dtype)
            expected.append(total)
    for results in run_ranks(kind, tp=size, work=work):
        for result, total in zip(cast("list[torch.Tensor]", results), expected, strict=True):
            assert torch.equal(result, total)


@pytest.mark.parametrize("kind", KINDS)
def test_many_sums_of_many_sizes_in_a_row(kind: GroupKind) -> None:
    """A slot would be overwritten while a slower rank still reads it."""
    sizes = [1 + (7919 * turn) % 90_000 for turn in range(150)]

    def work(seat: Seat) -> bool:
        right = True
        for turn, count in enumerate(sizes):
            if turn % 3 == seat.rank.number:
                torch.randn(20_000).sort()  # one is late, in turn
            tensor = torch.full((count,), float(turn + seat.rank.number))
            seat.groups.tp.all_reduce(tensor)
            right = right and bool((tensor == 3 * turn + 3).all())
        return right

    assert run_ranks(kind, tp=3, work=work) == [True] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_gather_brings_uneven_parts(kind: GroupKind) -> None:
    """Logits of an unevenly cut vocabulary would be lost."""
    shapes = [(2, 3), (2, 1), (2, 0)]

    def work(seat: Seat) -> bool:
        number = seat.rank.number
        part = torch.full(shapes[number], float(number))
        even = seat.groups.tp.gather(torch.tensor(number))
        parts = seat.groups.tp.gather(part, to=1, shapes=shapes)
        if number == 0:
            assert even is not None
            assert [int(one) for one in even] == [0, 1, 2]
        else:
            assert even is None
        if number != 1:
            return parts is None
        assert parts is not None
        wanted = [torch.full(shape, float(at)) for at, shape in enumerate(shapes)]
        return all(torch.equal(*pair) for pair in zip(parts, wanted, strict=True))

    assert run_ranks(kind, tp=3, work=work) == [True] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_stages_send_ahead(kind: GroupKind) -> None:
    """A stage would wait for the next one to be ready, and both would idle in turn."""
    rounds, count = 40, 100_000
    sent = threading.Event()

    def work(seat: Seat) -> bool:
        pipe, number = seat.groups.pipe, seat.rank.number
        assert (seat.groups.tp.size, pipe.size) == (2, 4)
        other = (number + 2) % 4
        right = True
        if number < 2:
            tensor = torch.empty(count)
            for turn in range(8):  # 3.2 MB under way before the other stage looks
                pipe.send(tensor.fill_(turn), other)
            sent.set()
            for turn in range(8, rounds):
                pipe.send(tensor.fill_(turn), other)
            tokens = torch.empty(1, dtype=torch.int64)
            pipe.recv(tokens, other)
            return int(tokens) == rounds
        assert sent.wait(WAIT_S)
        for turn in range(rounds):
            tensor = torch.empty(count)
            pipe.recv(tensor, other)
            right = right and bool((tensor == turn).all())
            seat.groups.tp.all_reduce(tensor)
            right = right and bool((tensor == 2 * turn).all())
        pipe.send(torch.tensor([rounds]), other)
        return right

    assert run_ranks(kind, tp=2, pp=2, work=work) == [True] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_larger_than_the_ring_arrive(kind: GroupKind) -> None:
    """A long prompt's activations would block both stages for ever."""
    count = 5_000_003

    def work(seat: Seat) -> bool:
        pipe = seat.groups.pipe
        if seat.rank.number == 0:
            pipe.send(torch.arange(count), 1)
            pipe.send(torch.arange(7, dtype=torch.uint8), 1)
            return True
        tensor, small = torch.empty(count, dtype=torch.int64), torch.empty(7, dtype=torch.uint8)
        pipe.recv(tensor, 0)
        pipe.recv(small, 0)
        return torch.equal(tensor, torch.arange(count)) and torch.equal(
            small, torch.arange(7, dtype=torch.uint8)
        )

    assert run_ranks(kind, tp=1, pp=2, work=work) == [True] * 2


def test_all_ways_were_used_once_before_a_replica_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first step would take as long as NCCL takes to set them up, and end as a lost rank."""
    used: set[tuple[int, int]] = set()
    summed: list[int] = []
    send, all_reduce = SharedMemoryGroup.send, SharedMemoryGroup.all_reduce

    def noted_send(group: SharedMemoryGroup, tensor: torch.Tensor, to: int) -> None:
        used.add((group.rank, to))
        send(group, tensor, to)

    def noted_sum(group: SharedMemoryGroup, tensor: torch.Tensor) -> None:
        summed.append(group.rank)
        all_reduce(group, tensor)

    monkeypatch.setattr(SharedMemoryGroup, "send", noted_send)
    monkeypatch.setattr(SharedMemoryGroup, "all_reduce", noted_sum)
    run_ranks("shm", tp=2, pp=3, work=lambda _: None)
    assert used == {(0, 2), (1, 3), (2, 4), (3, 5), (4, 0)}
    assert sorted(summed) == [0, 0, 0, 1, 1, 1]


def test_what_is_in_flight_fits_wherever_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that may not wait would wait: the one it waits for may wait for it."""
    monkeypatch.setattr(ring, "RING_BYTES", 64 << 10)
    monkeypatch.setattr(ring, "PIECE_BYTES", 8 << 10)
    for start in range(0, 64 << 10, 960):
        places = ring._Places()  # pyright: ignore[reportPrivateUsage]
        for at in range(0, start, 4096):
            places.take(min(4096, start - at))
        sent = [5000, 8 << 10, 8 << 10, 8 << 10, 8 << 10, 40]
        sent.append(ring.in_flight_bytes() - sum(sent))
        assert sum(places.take(length)[1] for length in sent) <= 64 << 10


@pytest.mark.parametrize("kind", KINDS)
def test_groups_leave_nothing_behind(kind: GroupKind) -> None:
    """Two hundred switches would end a worker for want of descriptors or threads."""
    rounds = 50 if kind == "gloo" else 20

    def open_fds() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    def work(seat: Seat) -> None:
        tensor = torch.ones(10)
        seat.groups.tp.all_reduce(tensor)
        assert tensor[0] == 2

    run_ranks(kind, tp=2, work=work)  # what torch keeps from its first use on
    before, threads = open_fds(), threading.active_count()
    for _ in range(rounds):
        run_ranks(kind, tp=2, work=work)
    assert open_fds() <= before
    assert threading.active_count() <= threads


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_session_wakes_who_waits_in_a_group(kind: GroupKind) -> None:
    """A rank would wait for one that is stuck, and its requests with it."""
    waiting = threading.Event()

    def work(seat: Seat) -> str:
        if seat.rank.number == 0:
            assert waiting.wait(WAIT_S)
            seat.session.lose(0, "for the test")
            return "lost"
        waiting.set()
        wait = {1: lambda: seat.groups.tp.all_reduce(torch.ones(5))}.get(
            seat.rank.number, lambda: seat.groups.pipe.recv(torch.ones(5), 0)
        )
        for _ in range(2):
            with pytest.raises(RankLost, match=r"for the test|has left|is gone"):
                wait()
        return "woken"

    assert run_ranks(kind, tp=3, work=work) == ["lost", "woken", "woken"]


def test_the_fitting_kind_is_chosen() -> None:
    """Ranks of one host would talk through its network."""
    chosen = run_ranks("auto", tp=2, work=lambda seat: seat.groups.kind)
    assert chosen == ["shm", "shm"]


def test_the_kind_follows_devices_and_hosts() -> None:
    """NCCL would be given two ranks on one GPU, or shared memory two hosts."""
    one, two, cpu = Place("cuda", "a", True), Place("cuda", "b", True), Place("cpu", "cpu", True)
    far = Place("cpu", "cpu", False)
    assert fitting_kind([one, two]) == "nccl"
    assert fitting_kind([one, one]) == "shm"
    assert fitting_kind([one, cpu]) == "shm"
    assert fitting_kind([cpu, cpu]) == "shm"
    assert fitting_kind([cpu, far]) == "gloo"


def test_one_rank_alone_needs_nobody() -> None:
    """The most common replica would need a session with itself."""
    server = PeerServer(worker_id="w0")
    groups = connect_groups(
        None, rank=Rank(), server=server, addresses=[server.address], device=CPU
    )
    tensor = torch.ones(3)
    groups.tp.all_reduce(tensor)
    gathered = groups.tp.gather(tensor)
    assert isinstance(groups.pipe, LoneGroup)
    assert groups.kind == "alone"
    assert gathered is not None
    assert torch.equal(gathered[0], torch.ones(3))
    groups.close()
    server.close()
