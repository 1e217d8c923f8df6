"""The decoder: one rank's part of a Llama-family model over a paged KV cache.

Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): a rank has some heads, some columns of
the MLP and some rows of the vocabulary, and partial results are summed over the ranks of its stage.
A stage of one rank sums nothing.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from services.worker.engine.torch_engine.batch import AttentionGroup, Batch
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.ranks.group import RankGroup
from services.worker.engine.torch_engine.rope import rotary_table, rotate
from services.worker.engine.torch_engine.sharding import RankCut, TensorShard, kv_shards
from services.worker.engine.torch_engine.weights import (
    Allocate,
    LayerWeights,
    StageWeights,
    zeros,
)
from shared.placement.sheets import Rank, Span


def _nothing() -> None:
    pass


class DecoderStage:
    """The layers of one rank. ``kv_named`` holds its part of the KV cache under shard names.
    ``on_layer`` is called after each layer, so that whoever watches sees that work goes on."""

    def __init__(
        self,
        model: ModelConfig,
        rank: Rank,
        weights: StageWeights,
        *,
        context_tokens: int,
        group: RankGroup | None = None,
        on_layer: Callable[[], None] = _nothing,
    ) -> None:
        """``group``: the ranks of the stage; None where there is one."""
        cut = RankCut(model, rank)
        self.weights = weights
        self.heads_per_kv_head = cut.heads_per_kv_head
        self._epsilon = model.norm_epsilon
        self._head_dim = model.head_dim
        self._heads, self._kv_heads = cut.heads, cut.kv_heads
        self._vocabulary = cut.vocabulary
        self._vocabulary_parts = [
            _size(RankCut(model, Rank(tp_rank=part, tp=rank.tp)).vocabulary)
            for part in range(rank.tp)
        ]
        self._scale = model.head_dim**-0.5
        self._model, self.rank = model, rank
        self._group = group
        self._on_layer = on_layer
        self.dtype, self.device = weights.dtype, weights.device
        self._cosines, self._sines = rotary_table(
            model.rope,
            head_dim=model.head_dim,
            positions=context_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        self.kv_named: dict[str, Tensor] = {}
        self._caches: list[tuple[Tensor, Tensor]] = []

    @property
    def hidden(self) -> int:
        """Elements of a token's hidden state."""
        return self._model.hidden

    @property
    def vocabulary(self) -> int:
        return self._model.vocabulary

    @property
    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kv_named.values())

    def allocate_kv(self, *, blocks: int, block_tokens: int, allocate: Allocate = zeros) -> None:
        """Zeros, not garbage: padded keys are masked, but a NaN would come through."""
        shards = kv_shards(self._model, self.rank, blocks=blocks, block_tokens=block_tokens)
        self.kv_named = {shard.name: self._zeros(shard, allocate) for shard in shards}
        tensors = list(self.kv_named.values())
        self._caches = list(zip(tensors[::2], tensors[1::2], strict=True))

    def grow_kv(
        self,
        *,
        blocks: int,
        block_tokens: int,
        copied: int,
        allocate: Allocate,
        free: Callable[[int], None],
    ) -> Iterator[tuple[TensorShard, TensorShard]]:
        """Make the KV cache ``blocks``, of which the first ``copied`` are as they were, a layer
        each time the caller goes on: its shards, which ``kv_named`` has from then on. ``free``
        is to let go of a layer before its new memory is asked for: that is other memory."""
        shards = kv_shards(self._model, self.rank, blocks=blocks, block_tokens=block_tokens)
        layers = zip(shards[::2], shards[1::2], strict=True)
        for number, (layer, pair) in enumerate(zip(self.weights.layers, layers, strict=True)):
            free(layer)
            new = (self._zeros(pair[0], allocate), self._zeros(pair[1], allocate))
            for kind in (0, 1):  # no name for the old ones: they would stay while the next are made
                new[kind][:copied].copy_(self._caches[number][kind][:copied])
            self._caches[number] = new
            self.kv_named.update(zip((shard.name for shard in pair), new, strict=True))
            yield pair

    def _zeros(self, shard: TensorShard, allocate: Allocate) -> Tensor:
        tensor = allocate(shard.shape, self.dtype, self.device, shard.name)
        return tensor if self.device.type == "cpu" else tensor.zero_()

    def embed(self, batch: Batch) -> Tensor:
        """Hidden states [tokens, hidden] of the first stage."""
        embedding = self.weights.embedding
        assert embedding is not None, "the first stage embeds"
        if self._group is None:
            return functional.embedding(batch.tokens, embedding)
        start, stop = self._vocabulary
        elsewhere = (batch.tokens < start) | (batch.tokens >= stop)
        if start == stop:  # more ranks than rows
            found = embedding.new_zeros((len(batch.tokens), self.hidden))
        else:
            found = functional.embedding(
                (batch.tokens - start).clamp_(0, stop - start - 1), embedding
            )
            found.masked_fill_(elsewhere[:, None], 0.0)
        self._group.all_reduce(found)
        return found

    def run_layers(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states after the stage's last layer; fills the KV cache."""
        cosines = self._cosines[batch.positions].unsqueeze(1)
        sines = self._sines[batch.positions].unsqueeze(1)
        for layer, cache in zip(self.weights.layers.values(), self._caches, strict=True):
            queries, keys, values = self._project(layer, self._norm(hidden, layer.input_norm))
            queries, keys = self._positioned(layer, queries, keys, (cosines, sines))
            _store(cache, batch.slots, keys, values)
            attended = self._attend(queries, cache, batch.groups)
            hidden = hidden + self._summed(attended, layer.output, layer.output_bias)
            inner = _gated(layer, self._norm(hidden, layer.mlp_norm))
            hidden = hidden + self._summed(inner, layer.down, layer.down_bias)
            self._on_layer()
        return hidden

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor | None:
        """[sampled, vocabulary] in float32, at the last stage's rank 0; None at its others. Only
        of the tokens that are sampled: the vocabulary is the widest matrix."""
        final_norm, output = self.weights.final_norm, self.weights.output
        assert final_norm is not None, "the last stage makes logits"
        assert output is not None, "the last stage makes logits"
        normed = self._norm(hidden.index_select(0, batch.sampled), final_norm)
        part = functional.linear(normed, output).float()
        if self._group is None:
            return part
        shapes = [(len(part), size) for size in self._vocabulary_parts]
        parts = self._group.gather(part, to=0, shapes=shapes)
        return None if parts is None else torch.cat(parts, dim=1)

    def _summed(self, inner: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A product whose inner dimension is spread over the ranks; the bias is added once."""
        if self._group is None:
            return functional.linear(inner, weight, bias)
        product = functional.linear(inner, weight)
        self._group.all_reduce(product)
        return product if bias is None else product.add_(bias)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, self._epsilon)

    def _project(self, layer: LayerWeights, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = functional.linear(hidden, layer.qkv, layer.qkv_bias)
        heads = fused.view(len(hidden), self._heads + 2 * self._kv_heads, self._head_dim)
        queries, rest = heads.tensor_split((self._heads,), dim=1)
        keys, values = rest.chunk(2, dim=1)
        return queries, keys, values

    def _positioned(
        self, layer: LayerWeights, queries: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._norm(queries, layer.query_norm)
            keys = self._norm(keys, layer.key_norm)
        return rotate(queries, *rotary), rotate(keys, *rotary)

    def _attend(
        self, queries: Tensor, cache: tuple[Tensor, Tensor], groups: list[AttentionGroup]
    ) -> Tensor:
        attended = torch.empty(
            (len(queries), self._heads * self._head_dim), dtype=self.dtype, device=self.device
        )
        for group in groups:
            values = self._attend_group(queries, cache, group)
            indexes = group.queries.view(-1)
            if group.padded is not None:
                indexes, values = indexes[group.padded], values[group.padded]
            attended.index_copy_(0, indexes, values)
        return attended

    def _attend_group(
        self, queries: Tensor, cache: tuple[Tensor, Tensor], group: AttentionGroup
    ) -> Tensor:
        """Query heads that share a KV head become further query rows, so that keys and values
        are gathered once and never repeated per head."""
        tiles, count = group.queries.shape
        shared = self._heads // self._kv_heads
        rows = queries[group.queries].view(tiles, count, self._kv_heads, shared, self._head_dim)
        rows = rows.permute(0, 2, 3, 1, 4).reshape(tiles, self._kv_heads, -1, self._head_dim)
        # Whole blocks are copied as rows: several times faster on a CPU than by element.
        keys, values = (
            part.view(len(part), -1)
            .index_select(0, group.blocks)
            .view(tiles, -1, self._kv_heads, self._head_dim)
            .transpose(1, 2)
            for part in cache
        )
        out = functional.scaled_dot_product_attention(
            rows, keys, values, attn_mask=group.mask, scale=self._scale
        )
        out = out.view(tiles, self._kv_heads, shared, count, self._head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(tiles * count, -1)


def _store(cache: tuple[Tensor, Tensor], slots: Tensor, keys: Tensor, values: Tensor) -> None:
    for part, new in zip(cache, (keys, values), strict=True):
        part.view(-1, *new.shape[1:]).index_copy_(0, slots, new)


def _gated(layer: LayerWeights, hidden: Tensor) -> Tensor:
    gate, up = functional.linear(hidden, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return functional.silu(gate) * up


def _size(part: Span) -> int:
    return part[1] - part[0]
