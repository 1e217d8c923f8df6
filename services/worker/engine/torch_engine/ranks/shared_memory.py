"""A rank group over memory that the ranks of one host share.

Each rank has a segment that it alone writes and all map: two slots for collectives, and a ring of
bytes for each other rank. Signals are words over Unix sockets, one for each pair. A word is sent
after what it tells of has been written, and read before that is: the kernel orders the two, on
every processor. Tensors on a GPU go through host memory.

Why two slots are enough: whoever signals its part of chunk k+1 has read all of chunk k; so when all
have signalled chunk k+1, the slot of chunk k may be overwritten by chunk k+2.
"""

from collections.abc import Sequence

import msgspec
import torch

from services.worker.engine.torch_engine.ranks.group import parts_for
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.membership import RankSession
from services.worker.engine.torch_engine.ranks.mesh import Members
from services.worker.engine.torch_engine.ranks.ring import (
    RING_BYTES,
    Receiving,
    Sending,
    in_flight_bytes,
    pieces_of,
)
from services.worker.engine.torch_engine.ranks.signals import Signals
from services.worker.peers.link import PeerLink
from services.worker.peers.segment import Segment
from services.worker.peers.wire import close_all
from shared.errors import PeerLost

SLOT_BYTES = 1 << 20
PAIR = 2  # ranks, that best sum up everything both
SHARED_SUM_BYTES_MIN = 256 << 10  # from here on more than two ranks sum up a share each


class SharedMemoryGroup:
    """``links``: local ones to the other members, by number in the group; owned from here on. Its
    calls, close included, are one thread's."""

    def __init__(
        self, session: RankSession, members: Members, links: dict[int, PeerLink], timeout_s: float
    ) -> None:
        self.rank, self.size = members.rank, members.size
        self._session, self._members = session, members
        self._segments: dict[int, Segment] = {}
        self._signals: dict[int, Signals] = {}
        self._links = links  # until they have become signals
        session.on_lost(self._abort)
        try:
            self._share(links, timeout_s)
        except BaseException:
            for link in links.values():
                link.close()
            self.close()
            raise
        memory = [_bytes_of(self._segments[number]) for number in range(self.size)]
        self._slots = [
            [part[start : start + SLOT_BYTES] for part in memory] for start in (0, SLOT_BYTES)
        ]
        self._typed: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._chunks, self._steps = 0, 0
        self._sending = {
            number: Sending(_ring(memory[self.rank], number), signals)
            for number, signals in self._signals.items()
        }
        self._receiving = {
            number: Receiving(_ring(memory[number], self.rank), signals)
            for number, signals in self._signals.items()
        }

    @property
    def in_flight_bytes(self) -> int:
        return in_flight_bytes()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        for chunk in pieces_of(flat, SLOT_BYTES // flat.element_size()):
            slots = self._next_slots(chunk)
            slots[self.rank].copy_(chunk)
            self._meet()
            if self.size > PAIR and chunk.nbytes >= SHARED_SUM_BYTES_MIN:
                self._sum_by_shares(chunk, slots)
            else:
                _sum_into(chunk, slots)

    def gather(
        self, tensor: torch.Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor] | None:
        if self.rank != to:
            self.send(tensor, to)
            return None
        parts = parts_for(tensor, to, self.size, shapes)
        for number, part in enumerate(parts):
            if number != to:
                self.recv(part, number)
        return parts

    def send(self, tensor: torch.Tensor, to: int) -> None:
        try:
            self._sending[to].send(tensor.view(-1).view(torch.uint8))
        except PeerLost as error:
            raise self._lost(to, error) from error

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        try:
            self._receiving[source].recv(tensor.view(-1).view(torch.uint8))
        except PeerLost as error:
            raise self._lost(source, error) from error

    def close(self) -> None:
        for signals in self._signals.values():
            signals.close()
        self._slots, self._typed = [], {}
        self._sending, self._receiving = {}, {}
        for segment in self._segments.values():
            segment.close()

    def _share(self, links: dict[int, PeerLink], timeout_s: float) -> None:
        """Give all others this rank's memory, and take theirs."""
        byte_count = 2 * SLOT_BYTES + self.size * RING_BYTES
        own = Segment.create(byte_count, f"oserve-group-{self.rank}")
        self._segments[self.rank] = own
        number = self.rank
        try:
            for number, link in links.items():  # noqa: B007  # told where it fails
                link.send(msgspec.msgpack.encode(byte_count), [own.fd])
            for number, link in links.items():
                self._segments[number] = _received(link, byte_count, timeout_s)
            for number, link in links.items():
                self._signals[number] = Signals(link.detach(), self._session.waiting)
        except PeerLost as error:
            raise self._lost(number, error) from error
        if (lost := self._session.lost) is not None:  # too early for _abort to find all signals
            raise lost

    def _next_slots(self, chunk: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' slots for ``chunk``, by number, in its type and length."""
        self._chunks += 1
        key = (self._chunks % 2, chunk.dtype)
        typed = self._typed.get(key)
        if typed is None:
            typed = [slot.view(chunk.dtype) for slot in self._slots[key[0]]]
            self._typed[key] = typed
        return [slot[: chunk.numel()] for slot in typed]

    def _meet(self) -> None:
        """Until all ranks have written what they write in this step."""
        self._steps += 1
        number = self.rank
        try:
            for number, signals in self._signals.items():  # noqa: B007  # told where it fails
                signals.step()
            for number, signals in self._signals.items():  # noqa: B007
                signals.wait(lambda signals=signals: signals.steps >= self._steps)
        except PeerLost as error:
            raise self._lost(number, error) from error

    def _sum_by_shares(self, chunk: torch.Tensor, slots: list[torch.Tensor]) -> None:
        """Each rank sums a share for all. Its slot has room for the sum: nobody else reads that
        share of it."""
        share = -(-chunk.numel() // self.size)
        parts = [pieces_of(slot, share) for slot in slots]  # [rank][share]; fewer shares if few
        sums = pieces_of(chunk, share)
        if self.rank < len(sums):
            _sum_into(sums[self.rank], [part[self.rank] for part in parts])
            parts[self.rank][self.rank].copy_(sums[self.rank])
        self._meet()
        for number, into in enumerate(sums):
            if number != self.rank:
                into.copy_(parts[number][number])

    def _lost(self, number: int, error: PeerLost) -> RankLost:
        """A member's loss is the session's."""
        rank = self._members.ranks[number]
        self._session.lose(rank, str(error))
        return self._session.lost or RankLost(rank, str(error))

    def _abort(self, _: RankLost) -> None:
        for link in list(self._links.values()):
            link.close()
        for signals in list(self._signals.values()):
            signals.abort()


def _received(link: PeerLink, byte_count: int, timeout_s: float) -> Segment:
    payload, fds = link.recv_fds(timeout_s)
    if len(fds) != 1 or msgspec.msgpack.decode(payload) != byte_count:
        close_all(fds)
        raise PeerLost(f"sent {len(fds)} segments, not one of {byte_count} bytes")
    # Only its maker writes there; but torch knows no tensors over read-only memory.
    return Segment.map(fds[0], byte_count, writable=True)


def _sum_into(into: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """In the order of ranks, so that all get the same bits. ``parts`` are others' memory."""
    parts = [part.to(into.device) for part in parts]
    torch.add(parts[0], parts[1], out=into)
    for part in parts[2:]:
        into.add_(part)


def _bytes_of(segment: Segment) -> torch.Tensor:
    return torch.frombuffer(segment.buffer, dtype=torch.uint8)


def _ring(memory: torch.Tensor, to: int) -> torch.Tensor:
    """Of ``memory``, a rank's segment, the ring to the rank ``to``."""
    start = 2 * SLOT_BYTES + to * RING_BYTES
    return memory[start : start + RING_BYTES]
