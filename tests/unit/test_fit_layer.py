"""Layers put together from operators, against sums by hand."""

import msgspec
import numpy as np
import pytest

from services.profiler.fit.attention import fit_decode, fit_prefill
from services.profiler.fit.layer import (
    KNOTS,
    Shard,
    collective_us,
    dense_us,
    head_us,
    splits,
    tensor_times,
)
from services.profiler.fit.models import LLAMA_30B, LLAMA_70B, OPT_66B, QWEN_32B
from services.profiler.fit.tables import AttentionTable
from shared.cost.profile import ModelFacts
from shared.errors import ConfigInvalid
from tests.unit.fit_cases import SMALL, gemm_us, made_up, made_up_operators


def beside(tokens: np.ndarray) -> np.ndarray:
    """A layer in which nothing but attention takes time."""
    return np.zeros(len(tokens))


def test_matrices_of_a_shard_of_llama_70b() -> None:
    """n and k swapped, or KV heads split that ought to be copied, would be another model."""
    assert Shard(LLAMA_70B, 8).gemms() == ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584))
    two_kv_heads = msgspec.structs.replace(LLAMA_70B, kv_heads=2)
    assert Shard(two_kv_heads, 8).gemms()[0] == ((8 + 2 * 1) * 128, 8192)
    assert Shard(LLAMA_70B, 8).vocabulary == 128256 // 8


def test_opt_has_no_gate_and_no_rotary_embedding() -> None:
    """Its MLP would be taken for half again as large."""
    shard = Shard(OPT_66B, 4)
    assert shard.gemms()[2] == (36864 // 4, 9216)
    assert len(shard.moved()) == 4
    assert len(Shard(LLAMA_70B, 4).moved()) == 5
    assert shard.moved()[-1] == 2 * 2 * 36864 // 4


def test_dense_time_is_the_sum_of_its_kernels() -> None:
    """By hand, 64 tokens on one GPU. GEMMs: 64 x (256 x 3,072 + 1,024 x 256 + 2,048 x 256
    + 256 x 1,024) / 1e6 us. Five kernels of 3 us, and the bytes of 64 tokens at 0.8 TB/s."""
    shard = Shard(SMALL, 1)
    gemms = gemm_us(64, 256 * 3072 + 1024 * 256 + 2048 * 256 + 256 * 1024, 1)
    per_token = 2 * 4 * 256 * 2 + 2 * 16 * 128 * 2 + 2 * 8 * 128 * 4 + 3 * 1024 * 2
    moved = 5 * 3 + 64 * per_token / 0.8e12 * 1e6
    found = dense_us(shard, made_up_operators(), np.array([64.0]))
    assert found[0] == pytest.approx(gemms + moved)


def test_collectives_of_a_layer() -> None:
    """Two all-reduces of tokens x hidden elements, and the embedding's as a share of one."""
    shard = Shard(SMALL, 2)
    found = collective_us(shard, made_up_operators(), np.array([16.0]))
    assert found[0] == pytest.approx((2 + 1 / 4) * 16 * 256 / 1e4)
    assert collective_us(Shard(SMALL, 1), made_up_operators(), np.array([16.0]))[0] == 0


def test_head_is_in_16_bits_and_gathered() -> None:
    """By hand, 4 sampled tokens on two GPUs: half the vocabulary each, whatever the weights of the
    layers; logits gathered, and 20 bytes moved for each."""
    found = head_us(Shard(SMALL, 2), made_up_operators(fp8=True), np.array([4.0]))
    wanted = gemm_us(4, 320, 256) + 4 * 640 / 1e3 + 3 + 4 * 640 * 20 / 0.8e12 * 1e6
    assert found[0] == pytest.approx(wanted)


def test_times_of_a_layer_recover_what_the_tables_were_made_of() -> None:
    """Coefficients would mean something else than the step model takes them for."""
    times = tensor_times(SMALL, 1, made_up_operators())
    assert times.tokens == KNOTS
    assert times.decode_us == pytest.approx(10, rel=1e-3)
    assert times.decode_request_us == pytest.approx(2, rel=1e-3)
    assert times.decode_context_ns == pytest.approx(1, rel=1e-3)
    assert times.prefill_chunk_us == pytest.approx(5, rel=1e-3)
    assert times.prefill_pair_ns == pytest.approx(1, rel=1e-3)
    exact = dense_us(Shard(SMALL, 1), made_up_operators(), np.array(KNOTS, dtype=np.float64))
    assert times.dense_us == pytest.approx(exact.tolist(), rel=0.01)


def test_an_eight_bit_cache_halves_what_context_costs() -> None:
    """Half the bytes are read."""
    facts = msgspec.structs.replace(SMALL, kv_bytes=1)
    times = tensor_times(facts, 1, made_up_operators())
    assert times.decode_context_ns == pytest.approx(0.5, rel=1e-3)


def test_unmeasured_multi_head_attention_scales_with_its_heads() -> None:
    """OPT-66B has 72 KV heads, decode was measured with 8: nine times the work of each request and
    token, and the same launch."""
    decode = fit_decode(AttentionTable(made_up().attentions, "decode"), 72, 72, beside)
    assert decode.step == pytest.approx(10)
    assert decode.request == pytest.approx(9 * 2)
    assert decode.context == pytest.approx(9 * 0.001)
    prefill = fit_prefill(AttentionTable(made_up().attentions, "prefill"), 72, 72, beside)
    assert prefill.pair == pytest.approx(9 * 0.001)


def test_heads_unlike_any_that_were_measured() -> None:
    """A guess would be passed off as a measurement."""
    table = AttentionTable(made_up().attentions, "decode")
    with pytest.raises(ConfigInvalid, match="nothing like it was measured"):
        fit_decode(table, 128, 1, beside)


@pytest.mark.parametrize(
    ("facts", "tps"),
    [
        (LLAMA_70B, [1, 2, 4, 8, 16]),
        (LLAMA_30B, [1, 2, 4]),
        (QWEN_32B, [1, 2, 4, 8]),
        (OPT_66B, [1, 2, 4, 8]),
    ],
)
def test_where_a_model_splits(facts: ModelFacts, tps: list[int]) -> None:
    """Plans would hold shapes that no engine starts in."""
    assert [tp for tp in (1, 2, 4, 8, 16) if splits(facts, tp)] == tps


def test_a_model_that_does_not_split_is_refused() -> None:
    """52 heads on 8 GPUs."""
    with pytest.raises(ConfigInvalid, match="52 heads"):
        tensor_times(LLAMA_30B, 8, made_up_operators())
