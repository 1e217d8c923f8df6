"""Which part of which tensor a rank holds: the one description of weights and KV cache.

A tensor is cut along at most one axis over the tensor-parallel ranks (Shoeybi et al., Megatron-LM,
2019: columns of the first matrix, rows of the second) and belongs to one pipeline stage by its
layer. Loading, and moving weights and KV cache between placements, are both copies between such
shards; this module therefore knows names and intervals, and no tensors.
"""

from dataclasses import dataclass

from services.worker.engine.torch_engine.model_config import ModelConfig
from shared.errors import ConfigInvalid

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One process's place in a replica of ``tp`` ranks times ``pp`` stages."""

    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    pp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShard:
    """``[start, stop)`` along ``axis`` of the full tensor; ``axis`` None means all of it."""

    name: str
    full_shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    stop: int = 0
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return self.full_shape
        size = self.stop - self.start
        return (*self.full_shape[: self.axis], size, *self.full_shape[self.axis + 1 :])

    @property
    def index(self) -> tuple[slice, ...]:
        """What to write between the brackets to cut the shard out of the full tensor."""
        if self.axis is None:
            return tuple(slice(None) for _ in self.full_shape)
        return (*(slice(None) for _ in range(self.axis)), slice(self.start, self.stop))


def interval(size: int, *, part: int, parts: int) -> tuple[int, int]:
    """The ``part``-th of ``parts`` nearly equal intervals of ``range(size)``."""
    return size * part // parts, size * (part + 1) // parts


def stage_layers(model: ModelConfig, rank: Rank) -> range:
    return range(*interval(model.layers, part=rank.pp_rank, parts=rank.pp))


def query_heads(model: ModelConfig, rank: Rank) -> tuple[int, int]:
    return interval(model.heads, part=rank.tp_rank, parts=rank.tp)


def kv_heads(model: ModelConfig, rank: Rank) -> tuple[int, int]:
    """The KV heads that the rank's query heads read; with more ranks than KV heads, several
    ranks hold the same one."""
    if rank.tp <= model.kv_heads:
        return interval(model.kv_heads, part=rank.tp_rank, parts=rank.tp)
    head = rank.tp_rank * model.kv_heads // rank.tp
    return head, head + 1


def check_rank(model: ModelConfig, rank: Rank) -> None:
    """Raises ConfigInvalid where the model cannot be cut that way."""
    if model.heads % rank.tp:
        raise ConfigInvalid(
            field="tp", value=rank.tp, remedy=f"use a divisor of the {model.heads} attention heads"
        )
    if model.kv_heads % rank.tp and rank.tp % model.kv_heads:
        raise ConfigInvalid(
            field="tp",
            value=rank.tp,
            remedy=f"use a divisor or a multiple of the {model.kv_heads} KV heads",
        )
    if rank.pp > model.layers:
        raise ConfigInvalid(
            field="pp", value=rank.pp, remedy=f"use at most the model's {model.layers} layers"
        )
    assert 0 <= rank.tp_rank < rank.tp, rank
    assert 0 <= rank.pp_rank < rank.pp, rank


def weight_shards(model: ModelConfig, rank: Rank) -> list[TensorShard]:
    """All weights of ``rank``, under the names of the checkpoint.

    Tied embeddings serve the first and the last stage, so both hold them.
    """
    check_rank(model, rank)
    first, last = rank.pp_rank == 0, rank.pp_rank == rank.pp - 1
    vocabulary = (model.vocabulary, model.hidden)
    part = interval(model.vocabulary, part=rank.tp_rank, parts=rank.tp)
    shards: list[TensorShard] = []
    if first or (last and model.tied_embeddings):
        shards.append(_cut(EMBEDDING, vocabulary, axis=0, part=part))
    for layer in stage_layers(model, rank):
        shards += _layer_shards(model, rank, layer)
    if last:
        shards.append(TensorShard(name=FINAL_NORM, full_shape=(model.hidden,)))
        if not model.tied_embeddings:
            shards.append(_cut(OUTPUT, vocabulary, axis=0, part=part))
    return shards


def kv_shards(
    model: ModelConfig, rank: Rank, *, blocks: int, block_tokens: int
) -> list[TensorShard]:
    """The KV cache of ``rank``: for each of its layers a key and a value tensor, cut by heads."""
    check_rank(model, rank)
    full = (blocks, block_tokens, model.kv_heads, model.head_dim)
    return [
        _cut(f"kv.layers.{layer}.{kind}", full, axis=2, part=kv_heads(model, rank), layer=layer)
        for layer in stage_layers(model, rank)
        for kind in ("key", "value")
    ]


def _layer_shards(model: ModelConfig, rank: Rank, layer: int) -> list[TensorShard]:
    prefix = f"model.layers.{layer}"
    width = model.head_dim
    query = _scaled(query_heads(model, rank), width)
    kv = _scaled(kv_heads(model, rank), width)
    mlp = interval(model.intermediate, part=rank.tp_rank, parts=rank.tp)
    shards = [
        TensorShard(name=f"{prefix}.{norm}.weight", full_shape=(model.hidden,), layer=layer)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    if model.qk_norm:
        shards += [
            TensorShard(name=f"{prefix}.self_attn.{norm}.weight", full_shape=(width,), layer=layer)
            for norm in ("q_norm", "k_norm")
        ]
    columns = (
        ("self_attn.q_proj", model.heads * width, query, model.qkv_bias),
        ("self_attn.k_proj", model.kv_heads * width, kv, model.qkv_bias),
        ("self_attn.v_proj", model.kv_heads * width, kv, model.qkv_bias),
        ("mlp.gate_proj", model.intermediate, mlp, model.mlp_bias),
        ("mlp.up_proj", model.intermediate, mlp, model.mlp_bias),
    )
    for name, rows, part, bias in columns:
        name_ = f"{prefix}.{name}"
        shards.append(_cut(f"{name_}.weight", (rows, model.hidden), axis=0, part=part, layer=layer))
        if bias:
            shards.append(_cut(f"{name_}.bias", (rows,), axis=0, part=part, layer=layer))
    rows_cut = (
        ("self_attn.o_proj", model.heads * width, query, model.output_bias),
        ("mlp.down_proj", model.intermediate, mlp, model.mlp_bias),
    )
    for name, size, part, bias in rows_cut:
        name_ = f"{prefix}.{name}"
        shards.append(_cut(f"{name_}.weight", (model.hidden, size), axis=1, part=part, layer=layer))
        if bias:  # added once, after the sum over ranks: every rank holds it whole
            shards.append(
                TensorShard(name=f"{name_}.bias", full_shape=(model.hidden,), layer=layer)
            )
    return shards


def _cut(
    name: str,
    full_shape: tuple[int, ...],
    *,
    axis: int,
    part: tuple[int, int],
    layer: int | None = None,
) -> TensorShard:
    return TensorShard(
        name=name, full_shape=full_shape, axis=axis, start=part[0], stop=part[1], layer=layer
    )


def _scaled(part: tuple[int, int], width: int) -> tuple[int, int]:
    return part[0] * width, part[1] * width
