"""Connects all groups of one replica's ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from services.worker.engine.torch_engine.ranks.group import RankGroup
from services.worker.engine.torch_engine.ranks.session import FollowerSession, LeaderSession
from services.worker.peers.server import PeerServer
from shared.placement.sheets import Rank

GroupKind = Literal["auto", "alone", "shm", "gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """``tp``: the ranks of my stage, by tp_rank. ``pipe``: all ranks, by number (send and recv)."""

    tp: RankGroup
    pipe: RankGroup
    kind: GroupKind

    def close(self) -> None: ...


def connect_groups(
    session: LeaderSession | FollowerSession | None,
    *,
    rank: Rank,
    server: PeerServer,
    addresses: Sequence[str],
    device: torch.device,
    kind: GroupKind = "auto",
    timeout_s: float = 30.0,
) -> Groups:
    """All ranks call it once, after gather/join. ``addresses``: of all ranks' servers, by number.
    ``session`` is None where the replica is one rank."""
    ...
