"""The layout of weights and KV cache over ranks, for any parallelism."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.torch_engine.model_config import ModelConfig, RopeConfig
from services.worker.engine.torch_engine.sharding import (
    EMBEDDING,
    Rank,
    TensorShard,
    kv_heads,
    kv_shards,
    query_heads,
    stage_layers,
    weight_shards,
)
from shared.errors import ConfigInvalid


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.sampled_from([1, 2, 4, 8]))
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary=draw(st.integers(8, 300)),
        hidden=draw(st.integers(1, 8)) * 16,
        intermediate=draw(st.integers(8, 100)),
        layers=draw(st.integers(1, 9)),
        heads=kv * draw(st.sampled_from([1, 2, 4, 8])),
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
    tp = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if model.heads % n == 0]))
    return model, tp, draw(st.integers(1, model.layers))


def ranks(tp: int, pp: int) -> list[Rank]:
    return [Rank(tp_rank=t, tp=tp, pp_rank=p, pp=pp) for p in range(pp) for t in range(tp)]


def assert_covered(pieces: list[TensorShard], *, copies: int) -> None:
    """Equal shapes, and every index of the axis held equally often: ``copies`` times in all."""
    assert len({(piece.full_shape, piece.axis, piece.layer) for piece in pieces}) == 1, pieces
    axis = pieces[0].axis
    if axis is None:
        assert len(pieces) == copies
        return
    held = Counter(index for piece in pieces for index in range(piece.start, piece.stop))
    assert held == dict.fromkeys(range(pieces[0].full_shape[axis]), held[0])


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
            assert layer is None or layer in stage_layers(model, Rank(pp_rank=stage, pp=pp))
            assert_covered(pieces, copies=tp)
            split_kv = "k_proj" in name or "v_proj" in name
            if pieces[0].axis is not None and not split_kv:
                assert (
                    sum(piece.stop - piece.start for piece in pieces)
                    == (pieces[0].full_shape[pieces[0].axis])
                )


@given(layouts())
def test_kv_heads_follow_their_query_heads(layout: tuple[ModelConfig, int, int]) -> None:
    """Otherwise a rank would attend with another head's keys."""
    model, tp, _ = layout
    for rank in ranks(tp, 1):
        readers = range(*query_heads(model, rank))
        needed = {head // (model.heads // model.kv_heads) for head in readers}
        assert needed == set(range(*kv_heads(model, rank)))


@given(layouts())
def test_kv_cache_covers_each_layer_and_head(layout: tuple[ModelConfig, int, int]) -> None:
    """Otherwise resharding would lose part of the cache of requests in flight; with more ranks
    than KV heads, each head is held by equally many."""
    model, tp, pp = layout
    held: defaultdict[str, list[TensorShard]] = defaultdict(list)
    for rank in ranks(tp, pp):
        for shard in kv_shards(model, rank, blocks=3, block_tokens=4):
            held[shard.name].append(shard)
    assert len(held) == 2 * model.layers
    for pieces in held.values():
        assert len(pieces) == tp
        assert_covered(pieces, copies=tp)
        heads = pieces[0].stop - pieces[0].start
        assert heads == max(1, model.kv_heads // tp)
        assert pieces[0].shape == (3, 4, heads, model.head_dim)


def test_uneven_cuts_are_refused() -> None:
    """Otherwise ranks would hold part of a head and compute nonsense."""
    model = ModelConfig(
        architecture="LlamaForCausalLM", vocabulary=10, hidden=24, intermediate=8, layers=2,
        heads=6, kv_heads=2, head_dim=4, norm_epsilon=1e-6, context_tokens=8, rope=RopeConfig(),
        tied_embeddings=False, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        sliding_window=None, dtype="float32",
    )  # fmt: skip
    for rank, field in ((Rank(tp=4), "tp"), (Rank(tp=3), "tp"), (Rank(pp=3), "pp")):
        with pytest.raises(ConfigInvalid) as refused:
            weight_shards(model, rank)
        assert refused.value.field == field
