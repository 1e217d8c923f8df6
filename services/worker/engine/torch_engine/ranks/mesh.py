"""Links between all members of a group, each with each."""

import contextlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.membership import RankSession
from services.worker.peers.link import PeerLink, connect
from services.worker.peers.server import PeerServer
from shared.errors import PeerLost

LOOK_S = 0.1  # how often who waits for others looks whether the session is lost
DIAL_S = 3.0  # for one that lives, has offered already, and answers by a thread of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who is in a group: ``ranks`` of the replica in order, of which ``mine`` is this process'.
    ``name`` is the group's alone among all groups of all replicas and epochs."""

    name: str
    ranks: Sequence[int]
    mine: int

    @property
    def rank(self) -> int:
        """This process' number in the group."""
        return self.ranks.index(self.mine)

    @property
    def size(self) -> int:
        return len(self.ranks)


class MeshOffer:
    """Takes the links of the members after this one. All must have offered before any dials."""

    def __init__(self, session: RankSession, server: PeerServer, members: Members) -> None:
        self._session = session
        self._server, self._members = server, members
        self._topic = f"group/{members.name}"
        self._came: queue.SimpleQueue[tuple[int, PeerLink]] = queue.SimpleQueue()
        self._taking = threading.Lock()
        self._closed = False
        server.offer(self._topic, self._on_link)

    def connect(self, addresses: Mapping[int, str], deadline_s: float) -> dict[int, PeerLink]:
        """Links by number in the group. Raises RankLost for a member that does not come; then, and
        in the end, nothing is left open that is not returned."""
        links: dict[int, PeerLink] = {}
        here, ranks = self._members.rank, self._members.ranks
        try:
            for there in range(here):
                links[there] = self._dial(addresses[ranks[there]], ranks[there], deadline_s)
            while missing := [n for n in range(here + 1, len(ranks)) if n not in links]:
                rank = ranks[missing[0]]
                number, link = self._next(rank, deadline_s)
                if (former := links.get(number)) is not None:
                    former.close()
                links[number] = link
        except BaseException:
            for link in links.values():
                link.close()
            raise
        finally:
            self.close()
        return links

    def close(self) -> None:
        """Take no more; those that nobody has taken are closed."""
        self._server.withdraw(self._topic, self._on_link)
        with self._taking:
            self._closed = True
        while not self._came.empty():
            self._came.get()[1].close()

    def _next(self, missing: int, deadline_s: float) -> tuple[int, PeerLink]:
        while (wait_s := deadline_s - time.monotonic()) > 0:
            if (lost := self._session.lost) is not None:
                raise lost
            with contextlib.suppress(queue.Empty):
                return self._came.get(timeout=min(wait_s, LOOK_S))
        raise RankLost(missing, "has not connected in time")

    def _dial(self, address: str, rank: int, deadline_s: float) -> PeerLink:
        hello = msgspec.msgpack.encode(self._members.rank)
        wait_s = min(DIAL_S, deadline_s - time.monotonic())
        try:
            return connect(address, self._topic, hello, timeout_s=max(0.0, wait_s))
        except PeerLost as error:
            raise RankLost(rank, str(error)) from error

    def _on_link(self, link: PeerLink, hello: bytes) -> None:
        """Detached from the server, so that no thread of it waits while the group lives."""
        number = msgspec.msgpack.decode(hello, type=int)
        with self._taking:
            if not self._closed and self._members.rank < number < self._members.size:
                self._came.put((number, PeerLink(link.detach(), link.peer)))
                return
        link.refuse(f"no member {number} is expected here")
