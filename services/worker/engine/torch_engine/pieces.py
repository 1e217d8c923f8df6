"""What is copied from one rank's tensors to another's, and how it is cut."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import BULK_BYTES_MAX, Part
from services.worker.engine.torch_engine.file_copy import written

_ROWS_ELEMENTS_MAX = 2**15
"""Of rows gathered at once: torch does so few in one thread. Each piece would else wait for a
second one, which on a busy machine takes ten times as long as the copy."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Copy ``part`` of the source to ``target``, of the same shape; or to these ``rows`` of it,
    where the part has rows. ``fresh``: the arena in which the target lies, where nothing has been
    written to it before."""

    part: Part
    target: Tensor
    rows: tuple[int, ...] = ()
    fresh: Arena | None = None

    @property
    def size(self) -> int:
        return math.prod(self.part.shape) * self.target.element_size()

    def write(self, values: Tensor) -> None:
        if self.rows:
            index = torch.tensor(self.rows, device=self.target.device)
            self.target.index_copy_(0, index, values.to(self.target.device))
        elif self.fresh is None or not written(self.fresh, self.target, values):
            self.target.copy_(values)

    def written(self) -> Tensor:
        if not self.rows:
            return self.target
        index = torch.tensor(self.rows, device=self.target.device)
        return self.target.index_select(0, index)


def split(piece: Piece, most: int) -> Iterator[Piece]:
    """Pieces of at most ``most`` bytes, of rows _ROWS_ELEMENTS_MAX, along the first dimension; one
    row may exceed it."""
    part, size = piece.part, piece.size
    if piece.rows:
        most = _ROWS_ELEMENTS_MAX * piece.target.element_size()
    if 0 < size <= most:
        yield piece
        return
    count = part.shape[0] if size else 0
    step = max(1, most * count // max(1, size))
    for first in range(0, count, step):
        last = min(first + step, count)
        if piece.rows:
            rows = msgspec.structs.replace(part, rows=part.rows[first:last])
            yield Piece(rows, piece.target, piece.rows[first:last])
            continue
        begin = (part.begin[0] + first, *part.begin[1:])
        end = (part.begin[0] + last, *part.end[1:])
        yield Piece(Part(part.name, begin, end), piece.target[first:last], fresh=piece.fresh)


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Small ones together, up to BULK_BYTES_MAX."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > BULK_BYTES_MAX:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group
