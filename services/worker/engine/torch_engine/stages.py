"""Weights in stages, where the old and the new ones do not fit side by side: what one rank does."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.sharding import TensorShard
from services.worker.engine.torch_engine.source import Between
from services.worker.engine.torch_engine.transfer import (
    disk_parts,
    fetch_weights,
    free_layers,
    no_pause,
)
from services.worker.engine.torch_engine.weights import StageWeights
from shared.errors import EngineFailed, PeerLost
from shared.placement.copies import DISK, Copy

LoadParts = Callable[[Iterable[tuple[TensorShard, Tensor]]], int]
"""Checkpoint.load."""


class StageOrder(msgspec.Struct, frozen=True, array_like=True):
    """Fetch the copies of ``stage``, and free the weights of ``layers``."""

    stage: int
    layers: tuple[int, int]


class Staged(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did of it: ``failure`` is empty if all."""

    failure: str = ""


class WeightStages:
    """The weights of one rank while they come, and while they go. ``fetched`` counts bytes by
    source over all stages; "" is the disk."""

    def __init__(
        self,
        weights: StageWeights,
        arena: Arena,
        exports: Exports | None = None,
        *,
        worker_id: str,
        load: LoadParts,
        between: Between = no_pause,
    ) -> None:
        self.fetched: dict[str, int] = {}
        self._weights, self._arena, self._exports = weights, arena, exports
        self._worker_id = worker_id
        self._load, self._between = load, between
        self._copies: Sequence[Copy] = ()
        self._peers: Mapping[str, str] = {}
        self._verify = False
        self._done = -1

    def fetch(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """Stage 0; the rest waits for ``advance``. Raises PeerLost, EngineFailed, ConfigInvalid."""
        self._copies, self._peers, self._verify = copies, peers, verify
        self._fetch(0)

    def advance(self, order: StageOrder) -> Staged:
        """Never raises for what is wrong with a source."""
        free_layers(self._weights, self._arena, self._exports, order.layers)
        try:
            for stage in range(self._done + 1, order.stage + 1):
                self._fetch(stage)
        except (PeerLost, EngineFailed) as error:
            return Staged(str(error))
        return Staged()

    def _fetch(self, stage: int) -> None:
        part = [copy for copy in self._copies if copy.stage == stage and copy.sheet != "cache"]
        fetched = fetch_weights(
            self._weights,
            part,
            self._peers,
            worker_id=self._worker_id,
            verify=self._verify,
            between=self._between,
        )
        from_disk = disk_parts(self._weights, part)
        if from_disk:
            fetched[DISK] = self._load(from_disk)
        for source, count in fetched.items():
            self.fetched[source] = self.fetched.get(source, 0) + count
        self._done = stage
