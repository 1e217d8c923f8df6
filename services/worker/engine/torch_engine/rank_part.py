"""Puts one rank together, leader or follower, whatever connects it to the others.

When all ranks have their weights they agree on the size of the KV cache, which the smallest of them
decides, and are ready.
"""

import contextlib
import struct
from collections.abc import Callable
from typing import Protocol

from services.worker.engine.torch_engine import sizing
from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.follower import FollowerParts, TorchFollower
from services.worker.engine.torch_engine.growth import CacheGrower, CacheGrowth, GrowthFollower
from services.worker.engine.torch_engine.kv_cache import BlockTable
from services.worker.engine.torch_engine.kv_transfer import KvTransfer
from services.worker.engine.torch_engine.leader import EngineParts, TorchEngine
from services.worker.engine.torch_engine.loading import Origin, WeightLoader
from services.worker.engine.torch_engine.model import DecoderStage
from services.worker.engine.torch_engine.opened_model import OpenedModel
from services.worker.engine.torch_engine.pipeline import Pipeline
from services.worker.engine.torch_engine.rank_runner import RankRunner
from services.worker.engine.torch_engine.ranks.group import RankGroup
from services.worker.engine.torch_engine.sharding import kv_shards
from services.worker.engine.torch_engine.source import Busy, unwatched
from services.worker.engine.torch_engine.stages import WeightStages
from services.worker.engine.torch_engine.step_plan import PlanReader, PlanWriter
from services.worker.engine.torch_engine.takeover import Takeover, TakeoverFollower
from services.worker.engine.torch_engine.transfer import no_pause
from services.worker.events import EngineStart
from services.worker.peers.server import PeerServer
from shared.errors import EngineFailed
from shared.hardware import Parallelism
from shared.placement.sheets import Rank
from shared.text import load_tokenizer

_LOAD_S = 900.0  # within which each must have its weights; a dead one is noticed earlier
_BLOCKS = struct.Struct("<qq")  # of the KV cache, to begin with and in full


class RankLink(Protocol):
    """The part of a session that both ends have."""

    def progress(self) -> None: ...
    def busy(self, busy: bool) -> None: ...


class LeaderLink(RankLink, Protocol):
    """The part of a LeaderSession that an engine uses."""

    def broadcast(self, payload: bytes) -> None: ...
    def recv(self, rank: int, timeout_s: float) -> bytes: ...


class FollowerLink(RankLink, Protocol):
    """The part of a FollowerSession that a follower uses."""

    def recv(self) -> bytes | None: ...
    def send(self, payload: bytes) -> None: ...
    def close(self) -> None: ...


class RankGroups(Protocol):
    """The part of ranks.connect.Groups that a rank computes with."""

    @property
    def tp(self) -> RankGroup: ...
    @property
    def pipe(self) -> RankGroup: ...


class RankPart:
    """One rank's weights and cache, offered to ``peers`` where there are any. ``undo`` ends it."""

    def __init__(
        self,
        model: OpenedModel,
        start: EngineStart | None = None,
        peers: PeerServer | None = None,
        between: Callable[[], None] = no_pause,
        fetched: dict[str, int] | None = None,
    ) -> None:
        """Without ``start`` it is a replica of its own. ``between`` and ``fetched`` as in Origin
        and WeightLoader."""
        self.model, self._start, self._peers, self._between = model, start, peers, between
        self._fetched = {} if fetched is None else fetched
        self.rank = Rank()
        if start is not None:
            self.rank = Rank.of(start.rank, Parallelism.parse(start.spec.parallelism))
        self.undo = contextlib.ExitStack()
        self.arena = Arena("torch-engine" if start is None else start.spec.replica_id)
        self.undo.callback(self.arena.close)
        self.exports: Exports | None = None
        self._groups: RankGroups | None = None
        self._link: RankLink | None = None

    def connect(self, link: RankLink, groups: RankGroups) -> None:
        """To the replica's other ranks, which watch from here on whether this one gets further."""
        self._link, self._groups = link, groups
        stopped = self._between

        def between() -> None:
            link.progress()
            stopped()

        self._between = between

    def load(self) -> None:
        """Allocate and fill the weights. Raises ConfigInvalid, PeerLost, EngineFailed."""
        model, start, link = self.model, self._start, self._link
        origin = Origin(folder=model.folder, peers={}, between=self._between)
        if start is not None:
            origin = Origin(
                folder=model.folder,
                worker_id=start.spec.gpus[start.rank],
                copies=start.copies,
                peers=start.peers,
                verify=start.verify,
                between=self._between,
                busy=self._busy,
            )
        self.loader = WeightLoader(
            model.facts, self.rank, self.arena, origin, dtype=model.dtype, device=model.device
        )
        self.loader.fetched = self._fetched
        self.loader.load(0)
        group = self._groups.tp if self._groups is not None and self.rank.tp > 1 else None
        self.stage = DecoderStage(
            model.facts,
            self.rank,
            self.loader.weights,
            context_tokens=model.context_tokens,
            group=group,
            on_layer=(lambda: None) if link is None else link.progress,
        )
        self.blocks, self.blocks_full = (
            sizing.kv_blocks(
                model.facts,
                model.config,
                self.rank,
                context_tokens=model.context_tokens,
                dtype=model.dtype,
                bytes_max=bytes_max,
            )
            for bytes_max in (0 if start is None else start.cache_bytes_max, 0)
        )

    def allocate_cache(self, blocks: int) -> None:
        """The KV cache, of as many blocks as all ranks have room for; from here on peers may
        read this rank's tensors."""
        model = self.model
        block_tokens = model.config.block_tokens
        self.stage.allocate_kv(
            blocks=blocks, block_tokens=block_tokens, allocate=self.arena.allocate
        )
        if self._peers is None or self._start is None:
            return
        replica_id = self._start.spec.replica_id
        self.exports = Exports(self._peers, self.arena, replica_id=replica_id)
        self.undo.callback(self.exports.close)
        self.exports.add(self.stage.weights.here, self.stage.weights.named)
        self._cache_shards = kv_shards(
            model.facts, self.rank, blocks=blocks, block_tokens=block_tokens
        )
        self.exports.add(self._cache_shards, self.stage.kv_named)

    def transfer(self) -> tuple[KvTransfer, WeightStages] | None:
        """What moves KV cache and weights here; None for a rank that no peer knows of."""
        start = self._start
        if start is None or self.exports is None:
            return None
        stage = self.stage
        kv = KvTransfer(
            self._cache_shards,
            stage.kv_named,
            worker_id=start.spec.gpus[start.rank],
            between=self._between,
            busy=self._busy,
        )
        return kv, WeightStages(stage.weights, self.arena, self.exports, load=self.loader.load)

    def growth(self, transfer: KvTransfer | None) -> CacheGrowth:
        """What enlarges the KV cache here."""
        return CacheGrowth(
            stage=self.stage,
            arena=self.arena,
            block_tokens=self.model.config.block_tokens,
            exports=self.exports,
            transfer=transfer,
            busy=self._busy,
            progress=no_pause if self._link is None else self._link.progress,
        )

    def cache_bytes(self, blocks: int, full: int) -> int:
        """Of ``full`` blocks, as this rank's ``blocks`` take what they do."""
        return self.stage.cache_bytes // blocks * full

    @property
    def _busy(self) -> Busy:
        return unwatched if self._link is None else self._link.busy

    def runner(self, table: BlockTable) -> RankRunner:
        if self._groups is None or self._link is None:
            return RankRunner(self.stage, table)
        return RankRunner(self.stage, table, pipe=self._groups.pipe, busy=self._link.busy)


def lead(part: RankPart, link: LeaderLink | None = None) -> TorchEngine:
    """Load the leading rank, or the only one (no ``link``), and make an engine of it. Raises
    ConfigInvalid, PeerLost, EngineFailed; the caller then undoes ``part``."""
    part.load()
    model, size = part.model, part.rank.tp * part.rank.pp
    room = [(part.blocks, part.blocks_full)]
    if link is not None:
        room += [_BLOCKS.unpack(link.recv(rank, _LOAD_S)) for rank in range(1, size)]
    blocks, full = (min(counts) for counts in zip(*room, strict=True))
    if link is not None:
        link.broadcast(_BLOCKS.pack(blocks, full))
    part.allocate_cache(blocks)
    scheduler = model.scheduler(blocks, full, part.rank.pp)
    runner = part.runner(scheduler.kv)
    takeover: Takeover | None = None
    if (transfer := part.transfer()) is not None:
        takeover = Takeover(scheduler, *transfer, followers=link, size=size)
    growth = part.growth(transfer and transfer[0])
    grower = CacheGrower(scheduler.kv, growth, followers=link, size=size)
    return TorchEngine(
        EngineParts(
            stage=part.stage,
            scheduler=scheduler,
            pipeline=Pipeline(runner, PlanWriter(scheduler.kv), link),
            tokenizer=load_tokenizer(str(model.folder)),
            context_tokens=model.context_tokens,
            fetched=part.loader.fetched,
            fetch_s=part.loader.fetch_s,
            takeover=takeover,
            grow=grower.grow,
            cache_bytes_full=part.cache_bytes(blocks, full),
            close=part.undo.close,
        )
    )


def follow(part: RankPart, link: FollowerLink) -> TorchFollower:
    """Load another rank. Raises as ``lead``."""
    part.load()
    link.send(_BLOCKS.pack(part.blocks, part.blocks_full))
    told = link.recv()
    if told is None:
        raise EngineFailed("the leader gave up before all ranks were ready")
    blocks: int
    full: int
    blocks, full = _BLOCKS.unpack(told)
    part.allocate_cache(blocks)
    table = part.model.block_table(full)
    takeover: TakeoverFollower | None = None
    if (transfer := part.transfer()) is not None:
        takeover = TakeoverFollower(*transfer, link)
    return TorchFollower(
        FollowerParts(
            runner=part.runner(table),
            reader=PlanReader(table),
            session=link,
            fetched=part.loader.fetched,
            fetch_s=part.loader.fetch_s,
            cache_bytes=lambda: part.stage.cache_bytes,
            cache_bytes_full=part.cache_bytes(blocks, full),
            stop=link.close,
            takeover=takeover,
            growth=GrowthFollower(part.growth(transfer and transfer[0]), link),
            close=part.undo.close,
        )
    )
