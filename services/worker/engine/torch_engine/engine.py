"""Starts the torch engine: one rank that is the whole replica, the leading one, or a follower.

Ranks meet before they load anything: whoever is missing is found out at once.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.follower import TorchFollower
from services.worker.engine.torch_engine.leader import TorchEngine
from services.worker.engine.torch_engine.rank_part import OpenedModel, RankPart, follow, lead
from services.worker.engine.torch_engine.rank_runner import LEADER
from services.worker.engine.torch_engine.ranks.connect import connect_groups
from services.worker.engine.torch_engine.ranks.session import FollowerSession, LeaderSession
from services.worker.engine.torch_engine.transfer import no_pause
from services.worker.events import EngineStart
from services.worker.peers.server import PeerServer

_MEET_S = 30.0  # within which all ranks must have been told to start


def load_torch_engine(path: str | Path, config: TorchEngineConfig) -> TorchEngine:
    """An engine of one rank that no peer knows of. Raises ConfigInvalid for a bad folder or
    setting."""
    part = RankPart(OpenedModel.open(path, config))
    with contextlib.ExitStack() as failed:
        failed.callback(part.undo.close)
        engine = lead(part)
        failed.pop_all()
    return engine


def build_torch_engine(
    start: EngineStart,
    path: str | Path,
    config: TorchEngineConfig,
    peers: PeerServer,
    *,
    between: Callable[[], None] = no_pause,
    fetched: dict[str, int] | None = None,
) -> TorchEngine:
    """The leading rank of ``start``'s replica, ready when all its ranks are. ``between`` is called
    while other ranks are waited for, and every few MiB of weights, and raises to give up;
    ``fetched`` is the engine's, to be looked at meanwhile. Raises ConfigInvalid, PeerLost where a
    source of weights is gone, EngineFailed where another rank is.
    """
    part = RankPart(OpenedModel.open(path, config), start, peers, between, fetched)
    size = part.rank.tp * part.rank.pp
    with contextlib.ExitStack() as failed:
        failed.callback(part.undo.close)
        session: LeaderSession | None = None
        if size > 1:
            session = LeaderSession(
                peers, replica_id=start.spec.replica_id, epoch=start.epoch, size=size
            )
            part.undo.callback(session.close)
            session.gather(_MEET_S, between)
            _connect(part, session, start, peers)
        engine = lead(part, session)
        failed.pop_all()
    return engine


def follow_torch_engine(
    start: EngineStart,
    path: str | Path,
    config: TorchEngineConfig,
    peers: PeerServer,
    *,
    between: Callable[[], None] = no_pause,
    fetched: dict[str, int] | None = None,
) -> TorchFollower:
    """Another rank of ``start``'s replica. Raises as build_torch_engine."""
    part = RankPart(OpenedModel.open(path, config), start, peers, between, fetched)
    with contextlib.ExitStack() as failed:
        failed.callback(part.undo.close)
        session = FollowerSession.join(
            start.peers[start.spec.gpus[LEADER]],
            replica_id=start.spec.replica_id,
            epoch=start.epoch,
            rank=start.rank,
            timeout_s=_MEET_S,
            between=between,
        )
        part.undo.callback(session.close)
        _connect(part, session, start, peers)
        follower = follow(part, session)
        failed.pop_all()
    return follower


def _connect(
    part: RankPart,
    session: LeaderSession | FollowerSession,
    start: EngineStart,
    peers: PeerServer,
) -> None:
    groups = connect_groups(
        session,
        rank=part.rank,
        server=peers,
        addresses=[start.peers[gpu] for gpu in start.spec.gpus],
        device=part.model.device,
    )
    part.undo.callback(groups.close)
    part.connect(session, groups)
