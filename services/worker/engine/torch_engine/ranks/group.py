"""What ranks say to each other about tensors."""

from collections.abc import Sequence
from typing import Protocol

import torch


class RankGroup(Protocol):
    """``rank`` and all ranks named are numbers within this group. One thread calls. Raises RankLost."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in place; contiguous. Every rank gets the same bits."""
    def gather(
        self, tensor: torch.Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor] | None:
        """All ranks' tensors at ``to``, None elsewhere. ``shapes``: of each rank's, where unequal."""
    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Does not wait for the receiver while some MiB are under way. The tensor may be reused."""
    def recv(self, tensor: torch.Tensor, source: int) -> None:
        """Fill ``tensor`` (contiguous) with the next that ``source`` sent to this rank."""
    def close(self) -> None: ...
