"""Connects all groups of one replica's ranks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from services.worker.engine.torch_engine.ranks.group import LoneGroup, RankGroup
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.mesh import Members, MeshOffer
from services.worker.engine.torch_engine.ranks.process_groups import (
    Store,
    client_store,
    gloo_group,
    nccl_group,
)
from services.worker.engine.torch_engine.ranks.session import FollowerSession, LeaderSession
from services.worker.engine.torch_engine.ranks.shared_memory import SharedMemoryGroup
from services.worker.peers.server import PeerServer
from shared.placement.sheets import Rank

Kind = Literal["alone", "shm", "gloo", "nccl"]
GroupKind = Literal["auto", "shm", "gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """``tp``: the ranks of my stage, numbered by tp_rank. ``pipe``: all ranks of the replica, by
    their numbers, for send, recv and gather between stages."""

    tp: RankGroup
    pipe: RankGroup
    kind: Kind

    def close(self) -> None:
        """Idempotent; in the thread that calls the groups."""
        self.tp.close()
        self.pipe.close()


class Place(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the leader. ``device``: which one it is, anywhere."""

    device_type: str
    device: str
    local: bool  # on one host with the leader


class _Choice(msgspec.Struct, frozen=True, array_like=True):
    """What the leader answers; ``host`` and ``port`` of the store."""

    kind: Kind
    host: str = ""
    port: int = 0


def connect_groups(  # noqa: PLR0913  # who, with whom, where and how
    session: LeaderSession | FollowerSession | None,
    *,
    rank: Rank,
    server: PeerServer,
    addresses: Sequence[str],
    device: torch.device,
    kind: GroupKind = "auto",
    timeout_s: float = 30.0,
) -> Groups:
    """All ranks call it at once, after gather and join, and get the leader's ``kind`` of groups.

    ``addresses``: of all ranks' servers, by number. ``session`` is None where the rank is alone.
    Raises RankLost: then the session is lost, too, and nothing is left behind.
    """
    if session is None or rank.tp * rank.pp == 1:
        return Groups(tp=LoneGroup(), pipe=LoneGroup(), kind="alone")
    connecting = _Connecting(session, rank, server, addresses, time.monotonic() + timeout_s)
    try:
        return connecting.run(device, kind)
    except BaseException as error:
        connecting.close()
        lost = error if isinstance(error, RankLost) else RankLost(rank.number, str(error))
        session.lose(lost.rank, lost.reason)
        if isinstance(error, RuntimeError | OSError):  # torch's
            raise lost from error
        raise


class _Connecting:
    """The steps of connect_groups, and what they have made so far."""

    def __init__(
        self,
        session: LeaderSession | FollowerSession,
        rank: Rank,
        server: PeerServer,
        addresses: Sequence[str],
        deadline_s: float,
    ) -> None:
        self._session, self._rank, self._server = session, rank, server
        self._addresses, self._deadline_s = dict(enumerate(addresses)), deadline_s
        stage = rank.pp_rank * rank.tp
        of_stage, of_all = range(stage, stage + rank.tp), range(rank.tp * rank.pp)
        name, mine = session.name, rank.number
        self._tp = Members(name=f"{name}/tp{rank.pp_rank}", ranks=of_stage, mine=mine)
        self._pipe = Members(name=f"{name}/pipe", ranks=of_all, mine=mine)
        self._offers = {
            members.name: MeshOffer(session, server, members)
            for members in (self._tp, self._pipe)
            if members.size > 1
        }
        self._made: list[RankGroup] = []
        self._store: Store | None = None

    def run(self, device: torch.device, kind: GroupKind) -> Groups:
        choice = self._agree(Place(device.type, _identity(device), self._local), kind)
        make = self._maker(choice, device)
        groups = Groups(tp=make(self._tp), pipe=make(self._pipe), kind=choice.kind)
        self._meet()
        self._close_offers()
        self._warm_up(groups, device)
        return groups

    def close(self) -> None:
        self._close_offers()
        for group in self._made:
            group.close()

    @property
    def _local(self) -> bool:
        return not isinstance(self._session, FollowerSession) or self._session.local

    @property
    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def _close_offers(self) -> None:
        for offer in self._offers.values():
            offer.close()

    def _agree(self, place: Place, kind: GroupKind) -> _Choice:
        """The leader hears of all where they are, and says which kind of group fits."""
        if isinstance(self._session, FollowerSession):
            self._session.send(msgspec.msgpack.encode(place))
            return msgspec.msgpack.decode(self._heard(self._session), type=_Choice)
        places = [place]
        for number in range(1, self._session.size):
            payload = self._session.recv(number, self._left_s)
            places.append(msgspec.msgpack.decode(payload, type=Place))
        choice = _Choice(fitting_kind(places) if kind == "auto" else kind)
        if choice.kind != "shm":
            self._store = Store(self._server.host, self._left_s)
            choice = _Choice(choice.kind, self._server.host, self._store.port)
        self._session.broadcast(msgspec.msgpack.encode(choice))
        return choice

    def _meet(self) -> None:
        """Until all ranks have made their groups: the leader's store is needed no more."""
        if isinstance(self._session, FollowerSession):
            self._session.send(b"")
            self._heard(self._session)
            return
        for number in range(1, self._session.size):
            self._session.recv(number, self._left_s)
        self._session.broadcast(b"")
        self._store = None

    def _warm_up(self, groups: Groups, device: torch.device) -> None:
        """Whoever will send to whom does it once: NCCL sets its ways up when they are first used,
        and in a step, where progress is expected, the rank would be taken for one that is stuck."""
        rank, word = self._rank, torch.zeros(1, device=device)
        groups.tp.all_reduce(word)
        if not rank.first_stage:
            groups.pipe.recv(word, rank.number - rank.tp)
        if not rank.last_stage:
            groups.pipe.send(word, rank.number + rank.tp)
        logits = (rank.pp - 1) * rank.tp
        if logits and rank.number == logits:
            groups.pipe.send(word, 0)
        if logits and rank.number == 0:
            groups.pipe.recv(word, logits)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _heard(self, session: FollowerSession) -> bytes:
        payload = session.recv()
        if payload is None:
            raise RankLost(0, "has closed the session while groups were made")
        return payload

    def _maker(self, choice: _Choice, device: torch.device) -> Callable[[Members], RankGroup]:
        def make(members: Members) -> RankGroup:
            group: RankGroup = LoneGroup() if members.size == 1 else make_one(members)
            self._made.append(group)
            return group

        make_one: Callable[[Members], RankGroup]
        if choice.kind == "shm":
            make_one = self._shared_memory
        else:
            timeout_s = self._left_s
            if self._store is not None:
                store = self._store.store
            else:
                store = client_store(choice.host, choice.port, timeout_s)
            if choice.kind == "gloo":
                make_one = lambda members: gloo_group(  # noqa: E731
                    self._session, members, store, host=self._server.host, timeout_s=timeout_s
                )
            else:
                make_one = lambda members: nccl_group(  # noqa: E731
                    self._session, members, store, device
                )
        return make

    def _shared_memory(self, members: Members) -> RankGroup:
        links = self._offers[members.name].connect(self._addresses, self._deadline_s)
        return SharedMemoryGroup(self._session, members, links, self._left_s)


def fitting_kind(places: Sequence[Place]) -> Kind:
    """NCCL takes one rank a device; ranks that share one go through its host's memory, as do ranks
    of one host that have none."""
    on_gpu = all(place.device_type == "cuda" for place in places)
    if on_gpu and len({place.device for place in places}) == len(places):
        return "nccl"
    return "shm" if all(place.local for place in places) else "gloo"


def _identity(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    cuda: Any = torch.cuda  # whose stubs do not know what they return
    return str(cuda.get_device_properties(device).uuid)
