"""The decoder: one pipeline stage of a Llama-family model over a paged KV cache."""

import torch
from torch import Tensor
from torch.nn import functional

from services.worker.engine.torch_engine.batch import AttentionGroup, Batch
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.rope import rotary_table, rotate
from services.worker.engine.torch_engine.sharding import Rank, kv_heads, kv_shards, query_heads
from services.worker.engine.torch_engine.weights import LayerWeights, StageWeights


class DecoderStage:
    """The layers of one rank. ``kv_named`` holds its part of the KV cache under shard names."""

    def __init__(
        self, model: ModelConfig, rank: Rank, weights: StageWeights, *, context_tokens: int
    ) -> None:
        self._weights = weights
        self._epsilon = model.norm_epsilon
        self._head_dim = model.head_dim
        self._heads = _size(query_heads(model, rank))
        self._kv_heads = _size(kv_heads(model, rank))
        self._scale = model.head_dim**-0.5
        self._model, self._rank = model, rank
        sample = weights.layers[0].input_norm
        self.dtype, self.device = sample.dtype, sample.device
        self._cosines, self._sines = rotary_table(
            model.rope,
            head_dim=model.head_dim,
            positions=context_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        self.kv_named: dict[str, Tensor] = {}
        self._caches: list[tuple[Tensor, Tensor]] = []

    def allocate_kv(self, *, blocks: int, block_tokens: int) -> None:
        """Zeros, not garbage: padded keys are masked, but a NaN would come through."""
        shards = kv_shards(self._model, self._rank, blocks=blocks, block_tokens=block_tokens)
        self.kv_named = {
            shard.name: torch.zeros(shard.shape, dtype=self.dtype, device=self.device)
            for shard in shards
        }
        tensors = list(self.kv_named.values())
        self._caches = list(zip(tensors[::2], tensors[1::2], strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [sampled, vocabulary] of a replica of one rank; fills the KV cache."""
        hidden = self.run_layers(self.embed(batch), batch)
        return self.logits(hidden, batch)

    def embed(self, batch: Batch) -> Tensor:
        assert self._weights.embedding is not None, "the first stage embeds"
        return functional.embedding(batch.tokens, self._weights.embedding)

    def run_layers(self, hidden: Tensor, batch: Batch) -> Tensor:
        cosines = self._cosines[batch.positions].unsqueeze(1)
        sines = self._sines[batch.positions].unsqueeze(1)
        for layer, cache in zip(self._weights.layers, self._caches, strict=True):
            queries, keys, values = self._project(layer, self._norm(hidden, layer.input_norm))
            queries, keys = self._positioned(layer, queries, keys, (cosines, sines))
            _store(cache, batch.slots, keys, values)
            attended = self._attend(queries, cache, batch.groups)
            hidden = hidden + functional.linear(attended, layer.output, layer.output_bias)
            hidden = hidden + _mlp(layer, self._norm(hidden, layer.mlp_norm))
        return hidden

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Only of the tokens that are sampled: the vocabulary is the widest matrix."""
        final_norm, output = self._weights.final_norm, self._weights.output
        assert final_norm is not None, "the last stage makes logits"
        assert output is not None, "the last stage makes logits"
        normed = self._norm(hidden.index_select(0, batch.sampled), final_norm)
        return functional.linear(normed, output).float()

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


def _mlp(layer: LayerWeights, hidden: Tensor) -> Tensor:
    gate, up = functional.linear(hidden, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, layer.down, layer.down_bias)


def _size(part: tuple[int, int]) -> int:
    return part[1] - part[0]
