"""Fills a rank's weights: from the checkpoint, or from the ranks of other replicas.

Stage by stage, where old and new weights do not fit into memory at once; what a copy has as its
source decides where each part comes from.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.checkpoint import Checkpoint
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.sharding import TensorShard, weight_shards
from services.worker.engine.torch_engine.source import Busy, unwatched
from services.worker.engine.torch_engine.transfer import (
    adopting,
    check_covered,
    covered,
    disk_parts,
    fetch_weights,
    no_pause,
)
from services.worker.engine.torch_engine.weights import StageWeights, extend_weights
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the weights of worker ``worker_id`` come from: along ``copies`` from ``peers``, and
    without any from the checkpoint in ``folder``. ``between`` is called every few MiB, and raises
    to stop; ``busy`` as in Source.pull."""

    folder: Path
    worker_id: str = ""
    copies: Sequence[Copy] = ()
    peers: Mapping[str, str]
    verify: bool = False
    between: Callable[[], None] = no_pause
    busy: Busy = unwatched


class WeightLoader:
    """``weights`` of ``rank``, allocated in ``arena`` and filled by ``load``, stage by stage: what
    comes later takes no memory before."""

    def __init__(
        self,
        model: ModelConfig,
        rank: Rank,
        arena: Arena,
        origin: Origin,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises ConfigInvalid, and EngineFailed if the copies do not bring all weights."""
        self._origin, self._arena = origin, arena
        self._copies = [copy for copy in origin.copies if copy.sheet != "cache"]
        self._checkpoint: Checkpoint | None = None
        self.fetched: dict[str, int] = {}  # grows piece by piece
        self.fetch_s = 0.0  # spent in ``load``
        if not self._copies or any(copy.source == DISK for copy in self._copies):
            self._checkpoint = _checked(origin.folder, model)
        allocate = arena.allocate
        shards = weight_shards(model, rank)
        if self._copies:
            check_covered(shards, self._copies)
            allocate = adopting(
                arena, shards, self._copies, origin.peers, worker_id=origin.worker_id
            )
        self._model, self._rank, self._allocate = model, rank, allocate
        self.weights = StageWeights(shards=shards, dtype=dtype, device=device)
        self._stages = first_stages(shards, self._copies)

    def load(self, stage: int) -> dict[str, int]:
        """Allocate and fill what the copies of ``stage`` bring; bytes by source, DISK for the
        checkpoint. May be called again after it has failed. Raises ConfigInvalid, PeerLost,
        EngineFailed, and what ``between`` raises."""
        weights = self.weights
        due = [
            shard
            for shard in weights.shards
            if self._stages[shard.name] == stage
            and shard.layer not in weights.layers
            and (shard.layer is not None or shard.name not in weights.named)
        ]
        extend_weights(weights, self._model, self._rank, due, allocate=self._allocate)
        began_s, before = time.perf_counter(), dict(self.fetched)
        try:
            found = self._fill(stage)
        except BaseException:
            self.fetched.clear()
            self.fetched.update(before)
            raise
        self.fetch_s += time.perf_counter() - began_s
        if len(weights.named) == len(weights.shards):
            self._allocate = self._arena.allocate  # what held on to tensors to be shared
        return found

    def _fill(self, stage: int) -> dict[str, int]:
        origin, weights = self._origin, self.weights
        found: dict[str, int] = {}
        if self._copies:
            found = fetch_weights(
                weights,
                self._copies,
                origin.peers,
                worker_id=origin.worker_id,
                stage=stage,
                verify=origin.verify,
                between=origin.between,
                busy=origin.busy,
                arrived=self._arrived,
                arena=self._arena,
            )
            parts = disk_parts(weights, self._copies, stage=stage)
        else:
            parts = [(shard, weights.named[shard.name]) for shard in weights.shards]
        if parts:
            assert self._checkpoint is not None, "what comes from the disk was checked before"
            found[DISK] = self._checkpoint.load(parts)
            self._arrived(DISK, found[DISK])
        return found

    def _arrived(self, source: str, count: int) -> None:
        self.fetched[source] = self.fetched.get(source, 0) + count


def first_stages(shards: Sequence[TensorShard], copies: Sequence[Copy]) -> dict[str, int]:
    """In which stage the first part of each tensor comes, all tensors of a layer at once: 0 where
    there are no copies."""
    found: dict[str | int, int] = {}
    for copy in copies:
        for shard, _ in covered(shards, copy):
            part = shard.name if shard.layer is None else shard.layer
            found[part] = min(found.get(part, copy.stage), copy.stage)
    return {
        shard.name: found.get(shard.name if shard.layer is None else shard.layer, 0)
        for shard in shards
    }


def _checked(folder: Path, model: ModelConfig) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    whole = weight_shards(model, Rank())
    checkpoint.refuse_unknown(whole, tied_embeddings=model.tied_embeddings)
    return checkpoint
