"""A stage's weights on its device: fused for speed, yet each addressable by its own name.

Queries, keys and values are one matrix product, and so are gate and up. The checkpoint's tensors
are views into the fused ones, so that loading and resharding write by name and copy once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.sharding import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    RankCut,
    TensorShard,
    weight_shards,
)
from shared.placement.sheets import Rank

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device, str], Tensor]
"""Memory for a tensor of this shape, named after the first shard that it holds: zeros on a CPU,
anything on a GPU."""

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(slots=True, kw_only=True)
class StageWeights:
    """``named`` holds every tensor of the rank under its checkpoint name, ``layers`` the same by
    the layer's number in the model, in order. Both lack what is not allocated yet."""

    shards: list[TensorShard]
    dtype: torch.dtype
    device: torch.device
    named: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    embedding: Tensor | None = None
    layers: dict[int, LayerWeights] = field(default_factory=dict[int, LayerWeights])
    final_norm: Tensor | None = None
    output: Tensor | None = None

    @property
    def here(self) -> list[TensorShard]:
        """Those that are allocated."""
        return [shard for shard in self.shards if shard.name in self.named]

    def free_layer(self, layer: int) -> None:
        """Let go of a layer's weights; their memory is free once nobody else holds them. The
        stage can run no more."""
        del self.layers[layer]
        for shard in [shard for shard in self.shards if shard.layer == layer]:
            self.shards.remove(shard)
            del self.named[shard.name]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: str) -> Tensor:
    """Torch's own memory, for an engine whose memory nobody else reads."""
    return torch.zeros(shape, dtype=dtype, device=device)


def allocate_weights(
    model: ModelConfig,
    rank: Rank,
    *,
    dtype: torch.dtype,
    device: torch.device,
    allocate: Allocate = zeros,
) -> StageWeights:
    """Uninitialised weights of ``rank``, to be filled by name."""
    weights = StageWeights(shards=weight_shards(model, rank), dtype=dtype, device=device)
    extend_weights(weights, model, rank, weights.shards, allocate=allocate)
    return weights


def extend_weights(
    weights: StageWeights,
    model: ModelConfig,
    rank: Rank,
    shards: Iterable[TensorShard],
    *,
    allocate: Allocate,
) -> None:
    """Allocate ``shards``, of a layer all or none, that ``weights`` of ``rank`` lack as yet."""
    wanted = {shard.name: shard for shard in shards}
    allocator = _Allocator(wanted, weights, allocate)
    for layer in RankCut(model, rank).layers:
        if any(shard.layer == layer for shard in wanted.values()):
            weights.layers[layer] = _layer(allocator, f"model.layers.{layer}.")
    weights.layers = dict(sorted(weights.layers.items()))
    if EMBEDDING in wanted:
        weights.embedding = allocator.one(EMBEDDING)
    if FINAL_NORM in wanted:
        weights.final_norm = allocator.one(FINAL_NORM)
    if OUTPUT in wanted:
        weights.output = allocator.one(OUTPUT)
    elif rank.last_stage and model.tied_embeddings:
        weights.output = weights.embedding
    assert wanted.keys() <= weights.named.keys()


class _Allocator:
    def __init__(
        self, shards: dict[str, TensorShard], weights: StageWeights, allocate: Allocate
    ) -> None:
        self._allocate = allocate
        self._named = weights.named
        self._shards = shards
        self._dtype, self._device = weights.dtype, weights.device

    def one(self, name: str) -> Tensor | None:
        return self.fused((name,))

    def needed(self, name: str) -> Tensor:
        tensor = self.one(name)
        assert tensor is not None, name
        return tensor

    def fused(self, names: tuple[str, ...]) -> Tensor | None:
        """One tensor of the named shards' rows in order; None if the rank has none of them."""
        shards = [self._shards[name] for name in names if name in self._shards]
        if not shards:
            return None
        assert len(shards) == len(names), names
        rows = [shard.shape[0] for shard in shards]
        shape = (sum(rows), *shards[0].shape[1:])
        whole = self._allocate(shape, self._dtype, self._device, names[0])
        self._named.update(zip(names, torch.split(whole, rows), strict=True))
        return whole


def _layer(allocator: _Allocator, prefix: str) -> LayerWeights:
    def fused(names: tuple[str, ...], kind: str) -> Tensor | None:
        return allocator.fused(tuple(f"{prefix}{name}.{kind}" for name in names))

    qkv, gate_up = fused(_QKV, "weight"), fused(_GATE_UP, "weight")
    assert qkv is not None
    assert gate_up is not None
    return LayerWeights(
        input_norm=allocator.needed(f"{prefix}input_layernorm.weight"),
        qkv=qkv,
        qkv_bias=fused(_QKV, "bias"),
        query_norm=allocator.one(f"{prefix}self_attn.q_norm.weight"),
        key_norm=allocator.one(f"{prefix}self_attn.k_norm.weight"),
        output=allocator.needed(f"{prefix}self_attn.o_proj.weight"),
        output_bias=allocator.one(f"{prefix}self_attn.o_proj.bias"),
        mlp_norm=allocator.needed(f"{prefix}post_attention_layernorm.weight"),
        gate_up=gate_up,
        gate_up_bias=fused(_GATE_UP, "bias"),
        down=allocator.needed(f"{prefix}mlp.down_proj.weight"),
        down_bias=allocator.one(f"{prefix}mlp.down_proj.bias"),
    )
