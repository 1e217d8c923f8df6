"""Makes process groups of torch.distributed, each on its own: there is no world, so that groups
come and go with the epochs of replicas. A store, which the leader holds, tells members of each
other.
"""

import contextlib
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from services.worker.engine.torch_engine.ranks.collective import CALL_S_MAX, GlooGroup, NcclGroup
from services.worker.engine.torch_engine.ranks.membership import RankSession
from services.worker.engine.torch_engine.ranks.mesh import Members

_dist: Any = torch.distributed  # its stubs know neither stores nor options


class Store:
    """The leader's end of a TCPStore, on the host that its peers reach it at alone."""

    def __init__(self, host: str, timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind((host, 0))
            listener.listen()
            self.port: int = listener.getsockname()[1]
            self.store: Any = _dist.TCPStore(
                host, self.port, is_master=True, timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False, master_listen_fd=listener.detach(),
            )  # fmt: skip


def client_store(host: str, port: int, timeout_s: float) -> Any:  # noqa: ANN401  # a torch Store
    return _dist.TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def gloo_group(
    session: RankSession,
    members: Members,
    store: Any,  # noqa: ANN401  # a torch Store
    *,
    host: str,
    timeout_s: float,
) -> GlooGroup:
    """``host``: this rank's own address, for the others to reach."""
    options: Any = _dist.ProcessGroupGloo._Options()  # noqa: SLF001  # the only way to name a device
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
    options._timeout = timedelta(seconds=min(timeout_s, CALL_S_MAX))  # noqa: SLF001
    options._threads = 2  # noqa: SLF001
    prefixed = _dist.PrefixStore(members.name, store)
    group = _dist.ProcessGroupGloo(prefixed, members.rank, members.size, options)
    return GlooGroup(session, members, group)


def nccl_group(
    session: RankSession,
    members: Members,
    store: Any,  # noqa: ANN401  # a torch Store
    device: torch.device,
) -> NcclGroup:
    """Communicators are made at once, one for each direction: later they would take seconds out of
    a step, and one for each pair that sends to each other."""
    numbered = torch.empty(0, device=device).device  # "cuda" alone stands for the current one

    def group(direction: str) -> Any:  # noqa: ANN401  # a torch process group
        options: Any = _dist.ProcessGroupNCCL.Options()
        prefixed = _dist.PrefixStore(f"{members.name}/{direction}", store)
        made: Any = _dist.ProcessGroupNCCL(prefixed, members.rank, members.size, options)
        made.eager_connect_single_device(numbered)
        return made

    return NcclGroup(session, members, group("up"), group("down"))
