"""Sharded tensors as sheets: layers one way, heads, columns or rows the other.

All weights and the KV cache of a decoder are a handful of *sheets*. A sheet is a grid of layers x
units, a unit being whatever tensor parallelism cannot cut further (a query head, a KV head, a
column of the MLP, a row of the vocabulary); every cell of it weighs the same. What a GPU holds of a
sheet is one *area*: an interval of layers (pipeline parallelism) times an interval of units (tensor
parallelism; Shoeybi et al., Megatron-LM, 2019). A change of parallelism is then a set of copies of
areas, whatever the change is.
"""

from typing import Literal

import msgspec

from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

SheetName = Literal["query", "kv", "mlp", "layer", "embedding", "output", "final_norm", "cache"]
"""query: q and o projections, by query head; kv: k and v projections, by KV head; mlp: gate, up and
down, by column; layer: what every rank of a layer holds whole (norms, biases added after a sum);
embedding, output: by row of the vocabulary; final_norm; cache: the KV cache, by KV head."""

Span = tuple[int, int]
"""``[start, stop)``."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A decoder's dimensions: all that is needed to say who holds what of it, and its bytes."""

    model_id: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    item_bytes: int  # of one weight, and of one element of the KV cache
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class Sheet(msgspec.Struct, frozen=True, kw_only=True):
    """``cell_bytes``: of one unit in one layer; of the cache, for one token."""

    name: SheetName
    layers: int
    units: int
    cell_bytes: int


class Area(msgspec.Struct, frozen=True, array_like=True):
    """Part of a sheet: these layers of these units."""

    layers: Span
    units: Span

    @property
    def cells(self) -> int:
        return (self.layers[1] - self.layers[0]) * (self.units[1] - self.units[0])

    def meet(self, other: "Area") -> "Area | None":
        """What both cover; None if that is nothing."""
        layers = _meet(self.layers, other.layers)
        units = _meet(self.units, other.units)
        return None if layers is None or units is None else Area(layers, units)


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's place in a replica of ``tp`` ranks times ``pp`` stages. In a plan's list of GPUs
    the ranks of a stage follow each other: number = pp_rank * tp + tp_rank."""

    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    pp: int = 1

    @classmethod
    def of(cls, number: int, shape: Parallelism) -> "Rank":
        assert 0 <= number < shape.gpus, (number, shape)
        pp_rank, tp_rank = divmod(number, shape.tp)
        return cls(tp_rank=tp_rank, tp=shape.tp, pp_rank=pp_rank, pp=shape.pp)

    @property
    def number(self) -> int:
        return self.pp_rank * self.tp + self.tp_rank

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


def interval(size: int, *, part: int, parts: int) -> Span:
    """The ``part``-th of ``parts`` nearly equal intervals of ``range(size)``; the longer ones come
    first, as in shared/cost/stages.py."""
    short, longer = divmod(size, parts)
    start = part * short + min(part, longer)
    return start, start + short + (part < longer)


def check_shape(model: ModelShape, shape: Parallelism) -> None:
    """Raises ConfigInvalid where the model cannot be cut that way."""
    if shape.tp > model.heads:
        raise ConfigInvalid(
            field="tp", value=shape.tp, remedy=f"use at most the {model.heads} attention heads"
        )
    if shape.pp > model.layers:
        raise ConfigInvalid(
            field="pp", value=shape.pp, remedy=f"use at most the model's {model.layers} layers"
        )


def stage_layers(model: ModelShape, rank: Rank) -> Span:
    return interval(model.layers, part=rank.pp_rank, parts=rank.pp)


def kv_heads(model: ModelShape, rank: Rank) -> Span:
    """The KV heads that the rank's query heads read. Without KV heads enough for all ranks, each
    rank holds one, and several hold the same."""
    if rank.tp <= model.kv_heads:
        return interval(model.kv_heads, part=rank.tp_rank, parts=rank.tp)
    head = rank.tp_rank * model.kv_heads // rank.tp
    return head, head + 1


def query_heads(model: ModelShape, rank: Rank) -> Span:
    """All query heads of the rank's KV heads, or its share of those of the one that it holds with
    others: a query head is always beside the KV head that it reads."""
    shared = model.heads // model.kv_heads
    first, last = kv_heads(model, rank)
    if rank.tp <= model.kv_heads:
        return first * shared, last * shared
    holders = [r for r in range(rank.tp) if r * model.kv_heads // rank.tp == first]
    part = interval(shared, part=holders.index(rank.tp_rank), parts=len(holders))
    return first * shared + part[0], first * shared + part[1]


def sheets_of(model: ModelShape) -> dict[SheetName, Sheet]:
    """Every sheet of the model. Bytes of biases are counted where they are cut."""
    item, hidden, width = model.item_bytes, model.hidden, model.head_dim
    bias = width if model.qkv_bias else 0
    whole = 2 * hidden + (2 * width if model.qk_norm else 0)
    whole += (hidden if model.output_bias else 0) + (hidden if model.mlp_bias else 0)
    found: list[tuple[SheetName, int, int, int]] = [
        ("query", model.layers, model.heads, 2 * width * hidden + bias),
        ("kv", model.layers, model.kv_heads, 2 * (width * hidden + bias)),
        ("mlp", model.layers, model.intermediate, 3 * hidden + (2 if model.mlp_bias else 0)),
        ("layer", model.layers, 1, whole),
        ("embedding", 1, model.vocabulary, hidden),
        ("final_norm", 1, 1, hidden),
        ("cache", model.layers, model.kv_heads, 2 * width),
    ]
    if not model.tied_embeddings:
        found.append(("output", 1, model.vocabulary, hidden))
    return {
        name: Sheet(name=name, layers=layers, units=units, cell_bytes=items * item)
        for name, layers, units, items in found
    }


def areas_of(model: ModelShape, rank: Rank) -> dict[SheetName, Area]:
    """What ``rank`` holds of each sheet, cache included; sheets it has no part of are left out.
    Tied embeddings serve the first and the last stage, so both hold them."""
    layers = stage_layers(model, rank)
    mlp = interval(model.intermediate, part=rank.tp_rank, parts=rank.tp)
    vocabulary = interval(model.vocabulary, part=rank.tp_rank, parts=rank.tp)
    held: dict[SheetName, Area] = {
        "query": Area(layers, query_heads(model, rank)),
        "kv": Area(layers, kv_heads(model, rank)),
        "mlp": Area(layers, mlp),
        "layer": Area(layers, (0, 1)),
        "cache": Area(layers, kv_heads(model, rank)),
    }
    if rank.first_stage or (rank.last_stage and model.tied_embeddings):
        held["embedding"] = Area((0, 1), vocabulary)
    if rank.last_stage:
        held["final_norm"] = Area((0, 1), (0, 1))
        if not model.tied_embeddings:
            held["output"] = Area((0, 1), vocabulary)
    return held


def weight_bytes(model: ModelShape, rank: Rank) -> int:
    """All weights of one rank."""
    sheets = sheets_of(model)
    held = areas_of(model, rank)
    return sum(
        area.cells * sheets[name].cell_bytes for name, area in held.items() if name != "cache"
    )


def cache_token_bytes(model: ModelShape, rank: Rank) -> int:
    """KV cache of one token on one rank."""
    return areas_of(model, rank)["cache"].cells * sheets_of(model)["cache"].cell_bytes


def _meet(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None
