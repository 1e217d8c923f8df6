"""The layout of weights and KV cache over ranks, for any parallelism."""

from collections import Counter, defaultdict
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.torch_engine.model_config import ModelConfig, RopeConfig
from services.worker.engine.torch_engine.sharding import (
    EMBEDDING,
    TensorShard,
    kv_shards,
    weight_shards,
)
from shared.errors import ConfigInvalid
from shared.placement.sheets import (
    Rank,
    areas_of,
    cache_token_bytes,
    kv_heads,
    query_heads,
    stage_layers,
    weight_bytes,
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.integers(1, 8))
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary=draw(st.integers(8, 300)),
        hidden=draw(st.integers(1, 8)) * 16,
        intermediate=draw(st.integers(8, 100)),
        layers=draw(st.integers(1, 9)),
        heads=kv * draw(st.integers(1, 8)),
        kv_heads=kv,
        head_dim=draw(st.sampled_from([2, 16])),
        norm_epsilon=1e-6,
        context_tokens=64,
        rope=RopeConfig(),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=None,
        dtype="float32",
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    model = draw(models())
    return model, draw(st.integers(1, model.heads)), draw(st.integers(1, model.layers))


def ranks(tp: int, pp: int) -> list[Rank]:
    return [Rank(tp_rank=t, tp=tp, pp_rank=p, pp=pp) for p in range(pp) for t in range(tp)]


def assert_covered(pieces: list[TensorShard], *, copies: int) -> None:
    """Equal shapes, and every index of the axis held: by one rank, or by several where there are
    fewer KV heads than ranks."""
    assert len({(piece.full_shape, piece.axis, piece.layer) for piece in pieces}) == 1, pieces
    assert len(pieces) == copies
    axis = pieces[0].axis
    if axis is None:
        return
    held = Counter(index for piece in pieces for index in range(piece.start, piece.stop))
    assert sorted(held) == list(range(pieces[0].full_shape[axis]))
    if max(held.values()) > 1:
        assert pieces[0].sheet in ("kv", "cache")
        assert all(piece.stop - piece.start == piece.unit for piece in pieces)


@given(layouts())
def test_weights_cover_the_model_once(layout: tuple[ModelConfig, int, int]) -> None:
    """Otherwise a sharded replica would miss or count twice a part of a matrix, and a switch
    would have no source for some bytes."""
    model, tp, pp = layout
    whole = {shard.name: shard for shard in weight_shards(model, Rank())}
    held: defaultdict[str, defaultdict[int, list[TensorShard]]]
    held = defaultdict(lambda: defaultdict(list))
    for rank in ranks(tp, pp):
        shards = weight_shards(model, rank)
        assert len({shard.name for shard in shards}) == len(shards)
        for shard in shards:
            assert shard.full_shape == whole[shard.name].full_shape == whole[shard.name].shape
            held[shard.name][rank.pp_rank].append(shard)
    assert held.keys() == whole.keys()
    for name, stages in held.items():
        shared = name == EMBEDDING and model.tied_embeddings and pp > 1
        assert list(stages) == ([0, pp - 1] if shared else list(stages)[:1])
        for stage, pieces in stages.items():
            layer = pieces[0].layer
            assert layer is None or layer in range(
                *stage_layers(model.shape("m", "float32"), Rank(pp_rank=stage, pp=pp))
            )
            assert_covered(pieces, copies=tp)


@given(layouts(), st.sampled_from(["float32", "bfloat16"]))
def test_shards_are_the_areas_that_a_switch_is_planned_by(
    layout: tuple[ModelConfig, int, int], dtype: str
) -> None:
    """Otherwise the copies of a switch would move other bytes than the engine holds, or memory
    would be reckoned wrongly."""
    model, tp, pp = layout
    shape = model.shape("m", dtype)
    for rank in ranks(tp, pp):
        areas = areas_of(shape, rank)
        weights = weight_shards(model, rank)
        cache = kv_shards(model, rank, blocks=3, block_tokens=4)
        for shard in (*weights, *cache):
            area = areas[shard.sheet]
            assert area.layers[0] <= (shard.layer or 0) < area.layers[1]
            if shard.axis is not None:
                units = (shard.start, shard.stop)
                assert units == (area.units[0] * shard.unit, area.units[1] * shard.unit)
            else:
                assert shard.unit == 0
                assert area.units == (0, 1)
        held = sum(prod(shard.shape) for shard in weights) * shape.item_bytes
        assert held == weight_bytes(shape, rank)
        held = sum(prod(shard.shape) for shard in cache) * shape.item_bytes
        assert held == 12 * cache_token_bytes(shape, rank)


@given(layouts())
def test_kv_heads_follow_their_query_heads(layout: tuple[ModelConfig, int, int]) -> None:
    """Otherwise a rank would attend with another head's keys."""
    model, tp, _ = layout
    shape = model.shape("m", "auto")
    for rank in ranks(tp, 1):
        readers = range(*query_heads(shape, rank))
        assert readers, "a rank without query heads does nothing"
        needed = {head // (model.heads // model.kv_heads) for head in readers}
        assert needed == set(range(*kv_heads(shape, rank)))


@given(layouts())
def test_kv_cache_covers_each_layer_and_head(layout: tuple[ModelConfig, int, int]) -> None:
    """Otherwise resharding would lose part of the cache of requests in flight."""
    model, tp, pp = layout
    held: defaultdict[str, list[TensorShard]] = defaultdict(list)
    for rank in ranks(tp, pp):
        for shard in kv_shards(model, rank, blocks=3, block_tokens=4):
            held[shard.name].append(shard)
    assert len(held) == 2 * model.layers
    for pieces in held.values():
        assert_covered(pieces, copies=tp)
        for piece in pieces:
            assert piece.shape == (3, 4, piece.stop - piece.start, model.head_dim)


def test_cuts_that_leave_a_rank_without_work_are_refused() -> None:
    """Otherwise GPUs would be given to ranks that have no head, or no layer."""
    model = ModelConfig(
        architecture="LlamaForCausalLM", vocabulary=10, hidden=24, intermediate=8, layers=2,
        heads=6, kv_heads=2, head_dim=4, norm_epsilon=1e-6, context_tokens=8, rope=RopeConfig(),
        tied_embeddings=False, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        sliding_window=None, dtype="float32",
    )  # fmt: skip
    for rank, field in ((Rank(tp=7), "tp"), (Rank(pp=3), "pp")):
        with pytest.raises(ConfigInvalid) as refused:
            weight_shards(model, rank)
        assert refused.value.field == field
