"""Turns a step's chunks into index arrays for the model.

Tokens of all requests are packed into one row, so that everything but attention is one batched
operation whatever the mix of prefill and decode. For attention they are cut into tiles of one
request each, and tiles of like size are padded into groups, at most double their size.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.worker.engine.torch_engine.kv_cache import BlockTable
from services.worker.engine.torch_engine.step_plan import StepPlan

Ints = npt.NDArray[np.int64]

# Bounds on what one attention call holds besides the cache: queries of a tile, keys gathered,
# and elements of the mask. A prefill cut into tiles also skips most keys it may not see.
_TILE_QUERIES_MAX = 256
_GROUP_KEYS_MAX = 2**16
_MASK_ELEMENTS_MAX = 2**23


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries ``[offset, offset + count)`` of the packed row, at positions from ``start``."""

    row: int
    offset: int
    count: int
    start: int

    @property
    def keys(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Tiles attended in one call. ``mask`` is additive: [tiles, 1, query rows, keys], where each
    query has a row for every query head that shares a KV head, head by head; a single query
    has one row for all, which broadcasts."""

    blocks: Tensor  # [tiles * blocks]
    queries: Tensor  # [tiles, queries], index into the packed row
    mask: Tensor
    padded: Tensor | None  # [tiles * queries] true where real; None if nothing is padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens], where their keys and values go in the cache
    groups: list[AttentionGroup]
    sampled: Tensor  # indexes of the tokens whose logits are wanted; at least one


class BatchBuilder:
    def __init__(self, *, heads_per_kv_head: int, dtype: torch.dtype, device: torch.device) -> None:
        self._heads_per_kv_head = heads_per_kv_head
        self._dtype = dtype
        self._device = device

    def build(self, plan: StepPlan, kv: BlockTable) -> Batch:
        rows, starts, counts = plan.rows, plan.starts, plan.counts
        ends = counts.cumsum()
        offsets = ends - counts
        positions: Ints = np.arange(int(ends[-1])) + np.repeat(starts - offsets, counts)
        blocks = kv.table[np.repeat(rows, counts), positions // kv.block_tokens]
        samples = plan.samples.astype(np.bool_)
        # Where nothing is sampled the last token is: a pipeline's end answers each step with rows.
        sampled = ends[samples] if samples.any() else ends[-1:]
        return Batch(
            tokens=self._tensor(plan.tokens),
            positions=self._tensor(positions),
            slots=self._tensor(blocks * kv.block_tokens + positions % kv.block_tokens),
            groups=[
                self._group(tiles, kv)
                for tiles in self._grouped(self._tiles(rows, offsets, counts, starts))
            ],
            sampled=self._tensor(sampled - 1),
        )

    def _tiles(self, rows: Ints, offsets: Ints, counts: Ints, starts: Ints) -> list[Tile]:
        tiles: list[Tile] = []
        for row, offset, count, start in zip(
            rows.tolist(), offsets.tolist(), counts.tolist(), starts.tolist(), strict=True
        ):
            keys = (start + count) * self._heads_per_kv_head
            size = max(16, min(_TILE_QUERIES_MAX, _MASK_ELEMENTS_MAX // keys))
            tiles += [
                Tile(row, offset + done, min(size, count - done), start + done)
                for done in range(0, count, size)
            ]
        return tiles

    def _grouped(self, tiles: list[Tile]) -> list[list[Tile]]:
        """Tiles of like size together: powers of two bound both the padding and the number of
        groups."""
        alike: defaultdict[tuple[int, int], list[Tile]] = defaultdict(list)
        for tile in tiles:
            alike[(tile.count - 1).bit_length(), max(6, (tile.keys - 1).bit_length())].append(tile)
        groups: list[list[Tile]] = []
        for (count_bits, keys_bits), members in alike.items():
            mask_elements = self._heads_per_kv_head << (count_bits + keys_bits)
            size = max(1, min(_GROUP_KEYS_MAX >> keys_bits, _MASK_ELEMENTS_MAX // mask_elements))
            groups += [members[first : first + size] for first in range(0, len(members), size)]
        return groups

    def _group(self, tiles: list[Tile], kv: BlockTable) -> AttentionGroup:
        rows = np.array([tile.row for tile in tiles])
        counts: Ints = np.array([tile.count for tile in tiles])[:, None]
        starts = np.array([tile.start for tile in tiles])[:, None]
        offsets = np.array([tile.offset for tile in tiles])[:, None]
        blocks = kv.blocks_for(max(tile.keys for tile in tiles))
        steps: Ints = np.arange(max(tile.count for tile in tiles))[None, :]
        real: npt.NDArray[np.bool_] = steps < counts
        queries = np.where(real, offsets + steps, 0)
        # A padded query sees the first key only: a row that sees none would yield NaN.
        seen_max = np.where(real, starts + steps, 0)
        keys = np.arange(blocks * kv.block_tokens)
        hidden = self._tensor(seen_max)[:, None, :, None] < self._tensor(keys)
        rows_per_query = self._heads_per_kv_head if real.shape[1] > 1 else 1
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return AttentionGroup(
            blocks=self._tensor(kv.table[rows, :blocks].reshape(-1)),
            queries=self._tensor(queries),
            mask=mask.masked_fill_(hidden, float("-inf")).repeat(1, 1, rows_per_query, 1),
            padded=None if real.all() else self._tensor(real.reshape(-1)),
        )

    def _tensor(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
