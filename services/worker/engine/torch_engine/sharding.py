"""Which part of which tensor a rank holds: the areas of shared/placement as named tensors.

``shared.placement.sheets`` says which units of which layers a rank holds; here each tensor of a
checkpoint, and of the KV cache, is told to which sheet it belongs and along which axis its units
lie. Loading, and moving weights and KV cache between placements, are both copies between such
shards; this module therefore knows names and intervals, and no tensors.
"""

from dataclasses import dataclass

from services.worker.engine.torch_engine.model_config import ModelConfig
from shared.hardware import Parallelism
from shared.placement.sheets import Area, Rank, SheetName, Span, areas_of, check_shape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShard:
    """``[start, stop)`` along ``axis`` of the full tensor; ``axis`` None means all of it.

    ``unit``: elements along ``axis`` of one unit of ``sheet``, 0 where ``axis`` is None: units
    ``[a, b)`` of the sheet are elements ``[a * unit, b * unit)`` of the full tensor. ``layer`` is
    the sheet's, so None (where there is one only) stands for 0.
    """

    name: str
    full_shape: tuple[int, ...]
    sheet: SheetName
    unit: int = 0
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


class RankCut:
    """What one rank holds of a model, ready to be looked up. Raises ConfigInvalid where the model
    cannot be cut that way."""

    def __init__(self, model: ModelConfig, rank: Rank) -> None:
        shape = model.shape("", "auto")
        check_shape(shape, Parallelism(rank.tp, rank.pp))
        self.areas: dict[SheetName, Area] = areas_of(shape, rank)
        self.layers = range(*self.areas["layer"].layers)
        self.heads = _size(self.areas["query"].units)
        self.kv_heads = _size(self.areas["cache"].units)
        self.vocabulary: Span = _vocabulary(model, rank)

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads


def weight_shards(model: ModelConfig, rank: Rank) -> list[TensorShard]:
    """All weights of ``rank``, under the names of the checkpoint.

    Tied embeddings serve the first and the last stage, so both hold them.
    """
    areas = RankCut(model, rank).areas
    vocabulary = (model.vocabulary, model.hidden)
    shards: list[TensorShard] = []
    if "embedding" in areas:
        shards.append(_cut(EMBEDDING, vocabulary, areas, "embedding"))
    for layer in range(*areas["layer"].layers):
        shards += _layer_shards(model, areas, layer)
    if "final_norm" in areas:
        norm = TensorShard(name=FINAL_NORM, full_shape=(model.hidden,), sheet="final_norm")
        shards.append(norm)
    if "output" in areas:
        shards.append(_cut(OUTPUT, vocabulary, areas, "output"))
    return shards


def kv_shards(
    model: ModelConfig, rank: Rank, *, blocks: int, block_tokens: int
) -> list[TensorShard]:
    """The KV cache of ``rank``: for each of its layers a key and a value tensor, cut by heads."""
    areas = RankCut(model, rank).areas
    full = (blocks, block_tokens, model.kv_heads, model.head_dim)
    return [
        _cut(f"kv.layers.{layer}.{kind}", full, areas, "cache", axis=2, layer=layer)
        for layer in range(*areas["cache"].layers)
        for kind in ("key", "value")
    ]


def _layer_shards(
    model: ModelConfig, areas: dict[SheetName, Area], layer: int
) -> list[TensorShard]:
    prefix = f"model.layers.{layer}"
    width = model.head_dim

    def whole(name: str, size: int) -> TensorShard:
        return TensorShard(name=f"{prefix}.{name}", full_shape=(size,), sheet="layer", layer=layer)

    shards = [
        whole("input_layernorm.weight", model.hidden),
        whole("post_attention_layernorm.weight", model.hidden),
    ]
    if model.qk_norm:
        shards += [whole(f"self_attn.{norm}.weight", width) for norm in ("q_norm", "k_norm")]
    columns: tuple[tuple[str, int, SheetName, int, bool], ...] = (
        ("self_attn.q_proj", model.heads * width, "query", width, model.qkv_bias),
        ("self_attn.k_proj", model.kv_heads * width, "kv", width, model.qkv_bias),
        ("self_attn.v_proj", model.kv_heads * width, "kv", width, model.qkv_bias),
        ("mlp.gate_proj", model.intermediate, "mlp", 1, model.mlp_bias),
        ("mlp.up_proj", model.intermediate, "mlp", 1, model.mlp_bias),
    )
    for name, rows, sheet, unit, bias in columns:
        shapes = {"weight": (rows, model.hidden)} | ({"bias": (rows,)} if bias else {})
        shards += [
            _cut(f"{prefix}.{name}.{kind}", full, areas, sheet, unit=unit, layer=layer)
            for kind, full in shapes.items()
        ]
    rows_cut: tuple[tuple[str, int, SheetName, int, bool], ...] = (
        ("self_attn.o_proj", model.heads * width, "query", width, model.output_bias),
        ("mlp.down_proj", model.intermediate, "mlp", 1, model.mlp_bias),
    )
    for name, size, sheet, unit, bias in rows_cut:
        full = (model.hidden, size)
        weight = f"{prefix}.{name}.weight"
        shards.append(_cut(weight, full, areas, sheet, axis=1, unit=unit, layer=layer))
        if bias:  # added once, after the sum over ranks: every rank holds it whole
            shards.append(whole(f"{name}.bias", model.hidden))
    return shards


def _cut(  # noqa: PLR0913  # one argument for each field of a shard
    name: str,
    full_shape: tuple[int, ...],
    areas: dict[SheetName, Area],
    sheet: SheetName,
    *,
    axis: int = 0,
    unit: int = 1,
    layer: int | None = None,
) -> TensorShard:
    start, stop = areas[sheet].units
    return TensorShard(
        name=name,
        full_shape=full_shape,
        sheet=sheet,
        unit=unit,
        axis=axis,
        start=start * unit,
        stop=stop * unit,
        layer=layer,
    )


def _vocabulary(model: ModelConfig, rank: Rank) -> Span:
    """The rows of the vocabulary that the rank looks up, or makes logits of."""
    return areas_of(model.shape("", "auto"), Rank(tp_rank=rank.tp_rank, tp=rank.tp))[
        "embedding"
    ].units


def _size(part: Span) -> int:
    return part[1] - part[0]
