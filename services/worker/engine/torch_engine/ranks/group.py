"""What ranks say to each other about tensors."""

from collections.abc import Sequence
from typing import Protocol

import torch


class RankGroup(Protocol):
    """Ranks are numbers within the group. Tensors are contiguous. One thread calls; all ranks make
    the same calls in the same order, but for send and recv, which only two take part in. Whatever
    waits raises RankLost once a rank, or the session, is lost."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def in_flight_bytes(self) -> int:
        """So much may be sent to one rank, and not be received yet, before ``send`` waits."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in place; every rank gets the same bits."""
        ...

    def gather(
        self, tensor: torch.Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor] | None:
        """All ranks' tensors at ``to``, None elsewhere. ``shapes``, by rank, where they differ."""
        ...

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Waits for the receiver only beyond ``in_flight_bytes``. Then the tensor may be used again
        at once."""
        ...

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        """Fill ``tensor`` by the next one that ``source`` has sent to this rank."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class LoneGroup:
    """The group of a rank that is alone."""

    rank, size = 0, 1
    in_flight_bytes = 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """It is the sum already."""

    def gather(
        self, tensor: torch.Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor] | None:
        assert to == 0, to
        assert shapes is None or [*shapes[0]] == [*tensor.shape], (shapes, tensor.shape)
        return [tensor]

    def send(self, tensor: torch.Tensor, to: int) -> None:  # noqa: ARG002  # the protocol's
        raise AssertionError(f"there is no rank {to}")

    def recv(self, tensor: torch.Tensor, source: int) -> None:  # noqa: ARG002  # the protocol's
        raise AssertionError(f"there is no rank {source}")

    def close(self) -> None:
        """Nothing is held."""


def parts_for(
    tensor: torch.Tensor, to: int, size: int, shapes: Sequence[Sequence[int]] | None
) -> list[torch.Tensor]:
    """Where ``to`` gathers all ranks' tensors: its own, and empty ones for the others'."""
    return [
        tensor
        if number == to
        else tensor.new_empty(tensor.shape if shapes is None else tuple(shapes[number]))
        for number in range(size)
    ]
