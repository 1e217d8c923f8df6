"""Rank groups of tensors on NVIDIA GPUs: through host memory on one, by NCCL on several."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch", reason="the torch extra is not installed")

import torch

from services.worker.engine.torch_engine.ranks.connect import Groups, connect_groups
from services.worker.engine.torch_engine.ranks.session import (
    FollowerSession,
    LeaderSession,
)
from services.worker.peers.server import PeerServer
from shared.hardware import Parallelism
from shared.placement.sheets import Rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

WAIT_S = 60.0


def run_rank(servers: list[PeerServer], number: int, device: torch.device) -> tuple[str, bool]:
    """The kind of group, and whether sums, gathers and sends came out right."""
    torch.cuda.set_device(device)
    session: LeaderSession | FollowerSession
    if number == 0:
        session = LeaderSession(servers[0], replica_id="r", epoch=1, size=len(servers))
        session.gather(WAIT_S)
    else:
        session = FollowerSession.join(
            servers[0].address, replica_id="r", epoch=1, rank=number, timeout_s=WAIT_S
        )
    groups = connect_groups(
        session,
        rank=Rank.of(number, Parallelism(tp=len(servers), pp=1)),
        server=servers[number],
        addresses=[server.address for server in servers],
        device=device,
        timeout_s=WAIT_S,
    )
    right = True
    for count in (1, 1000, 700_000):
        tensor = torch.full((count,), float(number + 1), device=device)
        groups.tp.all_reduce(tensor)
        right = right and bool((tensor == sum(range(1, len(servers) + 1))).all())
    gathered = groups.tp.gather(torch.tensor([number], device=device))
    if gathered is not None:
        right = right and torch.cat(gathered).cpu().equal(torch.arange(len(servers)))
    tensor = torch.zeros(1000, device=device)
    if number == 0:
        groups.pipe.send(tensor + 7, 1)
    elif number == 1:
        groups.pipe.recv(tensor, 0)
        right = right and bool((tensor == 7).all())
    right = right and crossing(groups, number, device)
    if isinstance(session, FollowerSession):
        session.recv()
    session.close()
    groups.close()
    return groups.kind, right


def crossing(groups: Groups, number: int, device: torch.device) -> bool:
    """Two stages send each other more than any buffer takes, each before it receives."""
    if number > 1:
        return True
    sent = torch.full((32 << 20,), float(number), device=device)
    into = torch.empty_like(sent) if number else sent.new_empty(4)
    groups.pipe.send(sent if number == 0 else sent[:4].clone(), 1 - number)
    groups.pipe.recv(into, 1 - number)
    return bool((into == 1 - number).all())


def run_on(devices: list[torch.device]) -> list[tuple[str, bool]]:
    servers = [PeerServer(worker_id=f"w{number}") for number in range(len(devices))]
    with ThreadPoolExecutor(len(devices)) as pool:
        ranks = [pool.submit(run_rank, servers, n, device) for n, device in enumerate(devices)]
        results = [rank.result() for rank in ranks]
    for server in servers:
        server.close()
    return results


@pytest.mark.timeout(300)
def test_ranks_on_one_gpu_go_through_host_memory() -> None:
    """A replica of several ranks could not be tried on a machine with one GPU."""
    assert run_on([torch.device("cuda", 0)] * 3) == [("shm", True)] * 3


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_on_gpus_of_their_own_use_nccl() -> None:
    """Ranks would copy each sum through the host, at a tenth of the speed."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert run_on(devices) == [("nccl", True)] * 2
