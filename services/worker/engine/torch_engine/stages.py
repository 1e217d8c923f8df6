"""Weights in stages, where the old and the new ones do not fit side by side: what one rank does."""

from collections.abc import Callable

import msgspec

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.transfer import free_layers
from services.worker.engine.torch_engine.weights import StageWeights
from shared.errors import ConfigInvalid, EngineFailed, PeerLost


class StageOrder(msgspec.Struct, frozen=True, array_like=True):
    """Free the weights of ``layers``; of an engine that comes, where these are none, fetch the
    copies of ``stage``."""

    stage: int
    layers: tuple[int, int]


class Staged(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did of it: ``failure`` is empty if all."""

    failure: str = ""


class WeightStages:
    """The weights of one rank while they come, and while they go. ``load`` is that of the
    WeightLoader, which has done stage 0 already."""

    def __init__(
        self,
        weights: StageWeights,
        arena: Arena,
        exports: Exports | None,
        *,
        load: Callable[[int], dict[str, int]],
    ) -> None:
        self._weights, self._arena, self._exports = weights, arena, exports
        self._load = load
        self._done = 0

    def advance(self, order: StageOrder) -> Staged:
        """Idempotent. Never raises for what is wrong with a source: what it says is the leader's
        to judge."""
        if order.layers[0] < order.layers[1]:
            free_layers(self._weights, self._arena, self._exports, order.layers)
            return Staged()
        try:
            for stage in range(self._done + 1, order.stage + 1):
                self._load(stage)
                self._done = stage
                if self._exports is not None:
                    self._exports.add(self._weights.here, self._weights.named)
        except (PeerLost, EngineFailed, ConfigInvalid) as error:
            return Staged(str(error))
        return Staged()
