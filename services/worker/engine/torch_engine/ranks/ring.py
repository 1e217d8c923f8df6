"""Tensors from one rank to another through a ring of shared bytes, in pieces."""

import torch

from services.worker.engine.torch_engine.ranks.signals import Signals

RING_BYTES = 8 << 20
PIECE_BYTES = 1 << 20
ALIGNED = 64  # where pieces start

assert RING_BYTES % ALIGNED == 0
assert PIECE_BYTES <= RING_BYTES


def in_flight_bytes() -> int:
    """So much of several tensors fits into a ring, wherever in it they begin."""
    return RING_BYTES - 2 * PIECE_BYTES


class _Places:
    """Where pieces lie. Sender and receiver count alike: a piece that does not fit before the
    ring's end starts at its beginning, and takes the room that it leaves out."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, length: int) -> tuple[int, int]:
        """Offset of the next piece of ``length`` bytes, and the room that it takes."""
        room = -(-length // ALIGNED) * ALIGNED
        skipped = RING_BYTES - self._next if self._next + room > RING_BYTES else 0
        offset = (self._next + skipped) % RING_BYTES
        self._next = (offset + room) % RING_BYTES
        return offset, room + skipped


class Sending:
    """To one other rank; ``ring`` is this rank's memory."""

    def __init__(self, ring: torch.Tensor, signals: Signals) -> None:
        self._ring, self._signals, self._places = ring, signals, _Places()
        self._used = 0  # bytes of room taken, ever

    def send(self, payload: torch.Tensor) -> None:
        """Bytes. Waits only while the ring is full."""
        for piece in pieces_of(payload, PIECE_BYTES):
            offset, room = self._places.take(piece.numel())
            self._used += room
            self._signals.wait(lambda: self._used - self._signals.room <= RING_BYTES)
            self._ring[offset : offset + piece.numel()].copy_(piece)
            self._signals.piece(piece.numel())


class Receiving:
    """From one other rank, whose memory ``ring`` is."""

    def __init__(self, ring: torch.Tensor, signals: Signals) -> None:
        self._ring, self._signals, self._places = ring, signals, _Places()

    def recv(self, into: torch.Tensor) -> None:
        """Bytes, as many as were sent at once."""
        for piece in pieces_of(into, PIECE_BYTES):
            self._signals.wait(lambda: bool(self._signals.pieces))
            length = self._signals.pieces.popleft()
            assert length == piece.numel(), f"{length} bytes were sent for {piece.numel()}"
            offset, room = self._places.take(length)
            piece.copy_(self._ring[offset : offset + length])
            self._signals.give_room(room)


def pieces_of(flat: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Views of ``length`` elements, the last as long as is left; none of nothing."""
    return [flat[start : start + length] for start in range(0, flat.numel(), length)]
