"""The control channel of a replica's ranks: who is in, what arrives, and who is lost when."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Literal

import pytest

pytest.importorskip("torch", reason="the torch extra is not installed")

import torch

from services.worker.engine.torch_engine.ranks import channel
from services.worker.engine.torch_engine.ranks import session as session_module
from services.worker.engine.torch_engine.ranks.connect import connect_groups
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.session import (
    FollowerSession,
    LeaderSession,
)
from services.worker.peers import wire
from services.worker.peers.link import PeerLink
from services.worker.peers.server import PeerServer
from shared.errors import EngineFailed, PeerLost
from shared.hardware import Parallelism
from shared.placement.sheets import Rank

pytestmark = pytest.mark.torch

WAIT_S = 30.0
STALL_S = 1.0


class Stopped(Exception):
    """What a caller that gives up raises."""


@pytest.fixture
def server() -> Iterator[PeerServer]:
    server = PeerServer(worker_id="w0")
    yield server
    server.close()


def lead(server: PeerServer, *, size: int = 2, stall_s: float = STALL_S) -> LeaderSession:
    return LeaderSession(
        server, replica_id="r", epoch=3, size=size, stall_s=stall_s, progress_s=stall_s
    )


def follow(server: PeerServer, rank: int = 1, *, stall_s: float = STALL_S) -> FollowerSession:
    return FollowerSession.join(
        server.address, replica_id="r", epoch=3, rank=rank,
        timeout_s=WAIT_S, stall_s=stall_s, progress_s=stall_s,
    )  # fmt: skip


def pair(server: PeerServer) -> tuple[LeaderSession, FollowerSession]:
    leader = lead(server)
    follower = follow(server)
    leader.gather(WAIT_S)
    return leader, follower


def wait_until(true: Callable[[], object]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_steps_go_out_in_order_and_answers_come_back(server: PeerServer) -> None:
    """A follower would perform another step than its leader."""
    leader = lead(server, size=3)
    followers = [follow(server, rank) for rank in (2, 1)]
    leader.gather(WAIT_S)
    for step in range(100):
        leader.broadcast(str(step).encode())
    leader.send(2, b"yours")
    for follower in followers:
        assert [follower.recv() for _ in range(100)] == [str(n).encode() for n in range(100)]
        follower.send(str(follower.rank).encode())
    assert followers[0].recv() == b"yours"
    assert [leader.recv(rank, WAIT_S) for rank in (1, 2)] == [b"1", b"2"]
    leader.close()
    assert [follower.recv() for follower in followers] == [None, None]
    for follower in followers:
        follower.close()
        assert (follower.lost, follower.recv()) == (None, None)
    assert leader.lost is None


def test_followers_may_come_before_their_leader(server: PeerServer) -> None:
    """Whether a switch succeeds would hang on which worker hears of it first."""
    joined: list[FollowerSession] = []
    coming = threading.Thread(target=lambda: joined.append(follow(server)))
    coming.start()
    leader = lead(server)
    leader.gather(WAIT_S)
    coming.join(WAIT_S)
    joined[0].close()
    leader.close()


def test_the_latest_join_of_a_rank_counts(server: PeerServer) -> None:
    """A worker that was restarted while its replica was prepared would be kept out."""
    leader = lead(server, size=3)
    early = follow(server, 1)
    late = follow(server, 1)
    other = follow(server, 2)
    leader.gather(WAIT_S)
    leader.broadcast(b"step")
    assert (late.recv(), other.recv(), early.recv()) == (b"step", b"step", None)
    for session in (early, late, other, leader):
        session.close()


def test_a_rank_that_does_not_come_is_named(server: PeerServer) -> None:
    """The switch would say that something took too long."""
    leader = lead(server, size=3)
    follower = follow(server, 1)
    with pytest.raises(RankLost, match="rank 2: has not joined") as raised:
        leader.gather(0.05)
    assert isinstance(raised.value, EngineFailed)
    leader.close()
    follower.close()
    with pytest.raises(RankLost, match="rank 0: cannot join"):
        FollowerSession.join(server.address, replica_id="r", epoch=3, rank=1, timeout_s=0.1)


def test_who_waits_for_other_ranks_can_be_told_to_give_up(server: PeerServer) -> None:
    """A replica that is stopped would hold its memory until the last of them is late."""

    def stopped() -> None:
        raise Stopped

    leader = lead(server)
    with pytest.raises(Stopped):
        leader.gather(WAIT_S, stopped)
    leader.close()
    with pytest.raises(Stopped):
        FollowerSession.join(
            server.address, replica_id="r", epoch=3, rank=1, timeout_s=WAIT_S, between=stopped
        )


def test_a_complete_session_takes_no_more(server: PeerServer) -> None:
    """A stray worker would take the place of a rank that serves."""
    leader, follower = pair(server)
    with pytest.raises(RankLost, match="nobody offers"):
        FollowerSession.join(server.address, replica_id="r", epoch=3, rank=1, timeout_s=0.1)
    leader.broadcast(b"x")
    assert follower.recv() == b"x"
    leader.close()
    follower.close()


def test_a_follower_that_leaves_loses_the_replica(server: PeerServer) -> None:
    """The leader would wait for a rank that has been stopped."""
    leader, follower = pair(server)
    heard: list[RankLost] = []
    leader.on_lost(heard.append)
    follower.close()
    with pytest.raises(RankLost, match="has left"):
        leader.recv(1, WAIT_S)
    wait_until(lambda: heard)
    leader.on_lost(heard.append)
    assert [lost.rank for lost in heard] == [1, 1]
    with pytest.raises(RankLost):
        leader.broadcast(b"")
    leader.close()


def test_a_loss_is_told_to_all(server: PeerServer) -> None:
    """Rank 2 would blame its leader, and an operator would look at the wrong GPU."""
    leader = lead(server, size=3)
    first, second = follow(server, 1), follow(server, 2)
    leader.gather(WAIT_S)
    first.lose(1, "out of memory")
    with pytest.raises(RankLost, match="rank 1: out of memory"):
        second.recv()
    with pytest.raises(RankLost, match="rank 1: out of memory"):
        leader.recv(2, WAIT_S)
    for session in (first, second, leader):
        session.close()


@pytest.mark.parametrize("stuck", ["leader", "follower"])
def test_a_rank_that_is_busy_without_progress_is_lost(
    server: PeerServer, stuck: Literal["leader", "follower"]
) -> None:
    """A rank whose device hangs would hang its replica, as its process lives on."""
    leader, follower = pair(server)
    (leader if stuck == "leader" else follower).busy(busy=True)
    wait = follower.recv if stuck == "leader" else lambda: leader.recv(1, WAIT_S)
    with pytest.raises(RankLost, match="busy without progress") as raised:
        wait()
    assert raised.value.rank == (0 if stuck == "leader" else 1)
    leader.close()
    follower.close()


@pytest.mark.parametrize("fault", ["silent", "stuck"])
def test_who_waits_is_not_blamed_for_whom_it_waits(server: PeerServer, fault: str) -> None:
    """An operator would look at the wrong GPU: neither of two ranks gets any further when one
    stands still and the other waits for it."""
    leader = lead(server, size=3)
    waits, faulty = follow(server, 1), follow(server, 2)
    leader.gather(WAIT_S)
    waits.busy(busy=True)
    if fault == "silent":
        faulty._closing.set()  # pyright: ignore[reportPrivateUsage]  # its heartbeats end
    else:
        waits.waiting(waiting=True)
        faulty.busy(busy=True)
    with pytest.raises(RankLost, match="silent" if fault == "silent" else "without") as raised:
        leader.recv(1, WAIT_S)
    assert raised.value.rank == 2
    for session in (waits, faulty, leader):
        session.close()


def test_ranks_that_wait_for_each_other_are_lost(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be taken for one that waits for another, and the replica would hang for ever."""
    leader, follower = pair(server)
    leap_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + leap_s[0])
    monkeypatch.setattr(session_module, "time", clock)
    (channel_to,) = leader._channels.values()  # pyright: ignore[reportPrivateUsage]
    leader.waiting(waiting=True)
    follower.busy(busy=True)
    wait_until(lambda: channel_to.doing is channel.Doing.BUSY)
    leap_s[0] = 100.0
    for _ in range(2):  # the first look sees that the leader waits
        leader._watch_all([channel_to])  # pyright: ignore[reportPrivateUsage]
        leap_s[0] = 200.0
        assert leader.lost is None, "one of them works"
    follower.waiting(waiting=True)
    wait_until(lambda: channel_to.doing is channel.Doing.WAITING)
    leap_s[0] = 300.0
    wait_until(lambda: leader.lost)
    assert "wait for each other" in str(leader.lost)
    leader.close()
    follower.close()


def test_progress_and_idleness_keep_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill, or a quiet night, would be taken for a stuck rank."""
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0])
    monkeypatch.setattr(channel, "time", clock)
    monkeypatch.setattr(wire, "time", clock)
    ends = [PeerLink(end, "rank") for end in socket.socketpair()]
    here, there = (channel.RankChannel(1, end, stall_s=2.0, progress_s=2.0) for end in ends)

    def after(wait_s: float, progress: int | None, *, busy: bool = False) -> str | None:
        now_s[0] += wait_s
        if progress is not None:
            there.beat(progress, channel.Doing(busy))
        here.hear()
        return here.silent or here.stuck

    assert after(0.0, 1, busy=True) is None
    assert after(1.9, 2, busy=True) is None
    assert after(1.9, 2, busy=True) is None
    assert after(0.2, 2, busy=True) == "busy without progress for 2 s"
    assert after(0.0, 2) is None
    assert after(1.9, 2) is None
    assert after(1.9, None) is None
    assert after(0.2, None) == "silent for 2 s"
    there.end()
    assert after(9.0, None) is None
    here.end()


def test_a_rank_that_sends_without_end_is_lost() -> None:
    """Messages that nobody takes would fill the memory of a leader."""
    ends = [PeerLink(end, "rank") for end in socket.socketpair()]
    here, there = (channel.RankChannel(1, end, stall_s=2.0, progress_s=2.0) for end in ends)
    with pytest.raises(PeerLost, match="nobody has taken"):  # noqa: PT012
        for _ in range(channel.MESSAGES_MAX + 1):
            there.send(b"")
            here.hear()
    there.end()
    here.end()


def test_an_answer_that_does_not_come_in_time_is_a_loss(server: PeerServer) -> None:
    """The leader would wait for ever for what a follower has forgotten."""
    leader, follower = pair(server)
    with pytest.raises(RankLost, match="not answered"):
        leader.recv(1, 0.1)
    leader.close()
    follower.close()


def serve_rank(addresses: list[str], number: int) -> None:
    """A follower's process: sums until it is killed."""
    server = PeerServer(worker_id=f"w{number}")
    addresses = [*addresses, server.address]
    session = FollowerSession.join(
        addresses[0], replica_id="r", epoch=3, rank=number, timeout_s=WAIT_S
    )
    session.send(server.address.encode())
    groups = connect_groups(
        session, rank=Rank.of(number, Parallelism(tp=2, pp=1)), server=server,
        addresses=addresses, device=torch.device("cpu"),
    )  # fmt: skip
    while True:
        groups.tp.all_reduce(torch.ones(1000))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_a_lost_rank(
    server: PeerServer, how: signal.Signals
) -> None:
    """A replica would hang with a dead GPU, and its requests would never be replayed."""
    leader = lead(server)
    process = started(server.address)
    try:
        leader.gather(WAIT_S)
        addresses = [server.address, leader.recv(1, WAIT_S).decode()]
        groups = connect_groups(
            leader, rank=Rank.of(0, Parallelism(tp=2, pp=1)), server=server,
            addresses=addresses, device=torch.device("cpu"),
        )  # fmt: skip
        assert groups.kind == "shm"
        tensor = torch.ones(1000)
        for _ in range(50):
            groups.tp.all_reduce(tensor)
        assert process.pid is not None
        os.kill(process.pid, how)
        with pytest.raises(RankLost) as raised:  # noqa: PT012
            while True:
                groups.tp.all_reduce(tensor.fill_(1))
        assert raised.value.rank == 1
        groups.close()
    finally:
        process.kill()
        process.join(WAIT_S)
        leader.close()


def started(address: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["services.worker.engine.torch_engine.engine"])  # torch is slow
    process = context.Process(target=serve_rank, args=([address], 1), daemon=True)
    process.start()
    return process
