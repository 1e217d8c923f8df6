"""What simulated GPUs hold, in bytes: weights by sheet, and KV cache."""

from collections.abc import Iterable

from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import Copy
from shared.placement.sheets import (
    ModelShape,
    Rank,
    Span,
    areas_of,
    cache_token_bytes,
    sheets_of,
    weight_bytes,
)


class Memory:
    """One model's bytes; without a shape nothing is known to weigh anything."""

    def __init__(self, shape: ModelShape | None) -> None:
        self.shape = shape

    def weights(self, spec: ReplicaSpec, rank: int) -> int:
        return 0 if self.shape is None else weight_bytes(self.shape, _rank(spec, rank))

    def layers(self, spec: ReplicaSpec, rank: int, layers: Span) -> int:
        """Of the rank's weights, those of ``layers``: what lies beside them stays."""
        if self.shape is None:
            return 0
        sheets = sheets_of(self.shape)
        total = 0
        for name, area in areas_of(self.shape, _rank(spec, rank)).items():
            start, stop = max(area.layers[0], layers[0]), min(area.layers[1], layers[1])
            if name not in {"cache", "embedding", "output", "final_norm"} and start < stop:
                units = area.units[1] - area.units[0]
                total += (stop - start) * units * sheets[name].cell_bytes
        return total

    def by_source(self, copies: Iterable[Copy], *, stage: int) -> dict[str, int]:
        """Bytes of the weights that are fetched in ``stage``, by where they come from."""
        found: dict[str, int] = {}
        if self.shape is None:
            return found
        sheets = sheets_of(self.shape)
        for copy in copies:
            if copy.sheet != "cache" and copy.stage == stage:
                size = copy.area.cells * sheets[copy.sheet].cell_bytes
                found[copy.source] = found.get(copy.source, 0) + size
        return found

    def token(self, spec: ReplicaSpec, rank: int) -> int:
        """KV cache of one token on one rank."""
        return 0 if self.shape is None else cache_token_bytes(self.shape, _rank(spec, rank))

    def token_everywhere(self, spec: ReplicaSpec) -> int:
        """The same on all ranks."""
        return sum(self.token(spec, rank) for rank in range(len(spec.gpus)))


def _rank(spec: ReplicaSpec, rank: int) -> Rank:
    return Rank.of(rank, Parallelism.parse(spec.parallelism))
