"""A KV cache that was made small, to fit beside replicas that were leaving, gets its full size.

Between two steps, layer by layer: new memory, a copy of the blocks in use, and the old memory goes,
so that never more than one layer's cache takes its memory twice. Whoever has the old memory open
would not see what is written from then on. So all ranks first keep new readers waiting, and where
there is a reader already, the growth is put off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import torch

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.commands import command
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.kv_transfer import KvTransfer
from services.worker.engine.torch_engine.model import DecoderStage
from services.worker.engine.torch_engine.source import Busy, unwatched
from services.worker.engine.torch_engine.takeover import FollowerLink, Followers
from services.worker.engine.torch_engine.transfer import no_pause

GROW = 3
"""Tag of what the leader tells its followers; takeover.py has the others."""

_ANSWER_S = 60.0
"""For a follower's answer; one that is gone is noticed long before by the session."""


class GrowOrder(msgspec.Struct, frozen=True, array_like=True):
    """First with ``ask``: keep readers out, if there are none. Then: make it ``blocks``, of which
    the first ``copied`` may be in use, or leave it as it is (0); and let readers in again."""

    ask: bool
    blocks: int = 0
    copied: int = 0


class Grown(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did of it."""

    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGrowth:
    """One rank's part. ``exports``, ``transfer``: None for a rank that no peer knows of. ``busy``
    and ``progress`` tell the other ranks that it works, and of each layer that is done."""

    stage: DecoderStage
    arena: Arena
    block_tokens: int
    exports: Exports | None = None
    transfer: KvTransfer | None = None
    busy: Busy = unwatched
    progress: Callable[[], None] = no_pause

    def obey(self, order: GrowOrder) -> Grown:
        if order.ask:
            return Grown(self.exports is None or self.exports.shut())
        try:
            self.busy(True)
            if order.blocks:
                self._grow(order)
        finally:
            self.busy(False)
            if self.exports is not None:
                self.exports.reopen()
        return Grown(bool(order.blocks))

    def _grow(self, order: GrowOrder) -> None:
        if self.transfer is not None:
            self.transfer.close()  # what it has open leads into the old tensors
        grown = self.stage.grow_kv(
            blocks=order.blocks,
            block_tokens=self.block_tokens,
            copied=order.copied,
            allocate=self.arena.allocate,
            free=self.arena.free_cache,
        )
        for shards in grown:
            self.progress()
            if self.exports is not None:
                self.exports.add(shards, self.stage.kv_named)
            if self.stage.device.type == "cuda":
                torch.cuda.empty_cache()  # the old ones are too small for the next layer


class CacheGrower:
    """The leader's side. ``followers`` are the other ranks, ``size`` - 1 of them."""

    def __init__(
        self,
        kv: KvBlocks,
        growth: CacheGrowth,
        *,
        followers: Followers | None = None,
        size: int = 1,
    ) -> None:
        self._kv, self._growth = kv, growth
        self._followers, self._size = followers, size

    def grow(self) -> None:
        """On all ranks, or on none. No step may be under way. Raises RankLost."""
        kv = self._kv
        if kv.total == kv.total_full:
            return
        free = all(self._obeyed(GrowOrder(ask=True)))
        blocks = kv.total_full if free else 0
        self._obeyed(GrowOrder(ask=False, blocks=blocks, copied=kv.reach))
        if free:
            kv.extend()

    def _obeyed(self, order: GrowOrder) -> list[bool]:
        """All ranks at once; whether each did it."""
        if self._followers is not None:
            self._followers.broadcast(command(GROW, msgspec.msgpack.encode(order)))
        own = self._growth.obey(order)
        if self._followers is None:
            return [own.done]
        told = (self._followers.recv(rank, _ANSWER_S) for rank in range(1, self._size))
        return [own.done, *(msgspec.msgpack.decode(answer, type=Grown).done for answer in told)]


class GrowthFollower:
    """A follower's side: ``handlers`` obey the leader's commands, by tag."""

    def __init__(self, growth: CacheGrowth, leader: FollowerLink) -> None:
        self._growth, self._leader = growth, leader

    @property
    def handlers(self) -> Mapping[int, Callable[[bytes], None]]:
        """Made when asked for, as those of TakeoverFollower."""
        return {GROW: self._obey}

    def _obey(self, body: bytes) -> None:
        order = msgspec.msgpack.decode(body, type=GrowOrder)
        self._leader.send(msgspec.msgpack.encode(self._growth.obey(order)))
