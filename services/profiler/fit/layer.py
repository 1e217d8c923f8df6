"""One layer and the head on the GPUs of one tensor-parallel group, by tokens in the step."""

from dataclasses import dataclass

import numpy as np

from services.profiler.fit.attention import fit_decode, fit_prefill
from services.profiler.fit.grid import Floats, curve_at_knots, rising
from services.profiler.fit.rows import HEAD_DIM
from services.profiler.fit.tables import AttentionTable, CollectiveTable, GemmTable, Measured
from shared.cost.profile import ModelFacts, TensorTimes
from shared.errors import ConfigInvalid

KNOTS = (
    1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144,
    8192, 12288, 16384,
)  # fmt: skip
BANDWIDTH_SHARE, LAUNCH_US = 0.8, 3.0
"""What kernels that only move data reach of a GPU's bandwidth, and their shortest time: the
empirical factors of aiconfigurator's system files."""
LOGIT_BYTES = 20
"""Moved for each logit while sampling: to 32 bit (2 read, 4 written), softmax (8), draw (6)."""
VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to it
REDUCES = 2  # all-reduces in a layer: after attention and after the MLP


@dataclass(frozen=True, slots=True)
class Operators:
    """The tables of one GPU, at the precision of a model's weights. Head and embedding stay in 16
    bits."""

    gemm: GemmTable
    head: GemmTable
    prefill: AttentionTable
    decode: AttentionTable
    collective: CollectiveTable
    memory_bytes_per_s: float


def operators(rows: Measured, *, fp8: bool, nvlink: bool, memory_bytes_per_s: float) -> Operators:
    """Raises ConfigInvalid if this precision was not measured."""
    plain = GemmTable(rows.gemms, "bfloat16")
    return Operators(
        gemm=GemmTable(rows.gemms, "fp8") if fp8 else plain,
        head=plain,
        prefill=AttentionTable(rows.attentions, "prefill"),
        decode=AttentionTable(rows.attentions, "decode"),
        collective=CollectiveTable(rows.collectives, nvlink=nvlink),
        memory_bytes_per_s=memory_bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """What one of ``tp`` GPUs computes of a model."""

    facts: ModelFacts
    tp: int

    @property
    def heads(self) -> int:
        return self.facts.heads // self.tp

    @property
    def kv_heads(self) -> int:
        """At least one: fewer KV heads than GPUs are copied."""
        return max(1, self.facts.kv_heads // self.tp)

    @property
    def ffn(self) -> int:
        return -(-self.facts.ffn // self.tp)

    @property
    def vocabulary(self) -> int:
        padded = -(-self.facts.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        return -(-padded // self.tp)

    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of the layer's matrices: query, key and value; output; up and gate; down."""
        facts, dim = self.facts, self.facts.head_dim
        return (
            ((self.heads + 2 * self.kv_heads) * dim, facts.hidden),
            (facts.hidden, self.heads * dim),
            ((1 + facts.gated) * self.ffn, facts.hidden),
            (facts.hidden, self.ffn),
        )

    def moved(self) -> tuple[int, ...]:
        """Bytes per token of the layer's other kernels: two norms with their residuals, rotary
        embedding where there is no table of positions, KV cache write, activation."""
        facts, dim = self.facts, self.facts.head_dim
        norm = 4 * facts.hidden * 2
        rotary = 2 * (self.heads + self.kv_heads) * dim * 2
        write = 2 * self.kv_heads * dim * (2 + facts.kv_bytes)
        activation = (2 + facts.gated) * self.ffn * 2
        return (norm, norm, *(() if facts.positions else (rotary,)), write, activation)


def splits(facts: ModelFacts, tp: int) -> bool:
    """Whether vLLM runs the model on ``tp`` GPUs: query heads divide, KV heads divide or are
    copied."""
    if facts.heads % tp:
        return False
    return facts.kv_heads % tp == 0 or tp % facts.kv_heads == 0


def dense_us(shard: Shard, tables: Operators, tokens: Floats) -> Floats:
    """Projections, MLP and what moves data between them."""
    total = np.zeros(len(tokens))
    for n, k in shard.gemms():
        total += tables.gemm.us(tokens, n, k)
    for bytes_per_token in shard.moved():
        total += _moved_us(tables, tokens * bytes_per_token)
    return total


def collective_us(shard: Shard, tables: Operators, tokens: Floats) -> Floats:
    """All-reduces of one layer; that of the embedding is spread over the layers."""
    if shard.tp == 1:
        return np.zeros(len(tokens))
    once = tables.collective.all_reduce_us(tokens * shard.facts.hidden, shard.tp)
    return once * (REDUCES + 1 / shard.facts.layers)


def head_us(shard: Shard, tables: Operators, sampled: Floats) -> Floats:
    """Logits of ``sampled`` tokens, gathered from all GPUs, and the draw from them."""
    logits = sampled * shard.vocabulary * shard.tp
    total = tables.head.us(sampled, shard.vocabulary, shard.facts.hidden)
    if shard.tp > 1:
        total = total + tables.collective.all_gather_us(logits, shard.tp)
    return total + _moved_us(tables, logits * LOGIT_BYTES)


def _moved_us(tables: Operators, byte_count: Floats) -> Floats:
    return LAUNCH_US + byte_count / (BANDWIDTH_SHARE * tables.memory_bytes_per_s) * 1e6


def tensor_times(facts: ModelFacts, tp: int, tables: Operators) -> TensorTimes:
    """Raises ConfigInvalid where vLLM would not split the model so, or nothing like it was
    measured."""
    if not splits(facts, tp):
        remedy = f"{facts.heads} heads and {facts.kv_heads} KV heads cannot be split so"
        raise ConfigInvalid(field="tp", value=tp, remedy=remedy)
    shard = Shard(facts, tp)
    sizes = [m for m in tables.gemm.sizes if m <= KNOTS[-1]]
    points = np.array(sorted({*sizes, *KNOTS}), dtype=np.float64)
    knots = np.array(KNOTS, dtype=np.float64)
    dense = curve_at_knots(points, dense_us(shard, tables, points), KNOTS)
    collective = rising(collective_us(shard, tables, knots), np.ones(len(knots)))
    head = curve_at_knots(points, head_us(shard, tables, points), KNOTS)

    def beside(tokens: Floats) -> Floats:
        return np.interp(tokens, knots, dense + collective)

    size = facts.head_dim / HEAD_DIM
    heads = (shard.heads * size, shard.kv_heads * size)
    decode = fit_decode(tables.decode, *heads, beside)
    prefill = fit_prefill(tables.prefill, *heads, beside)
    cache = facts.kv_bytes / 2  # the rows are of a 16-bit cache
    return TensorTimes(
        tp=tp,
        tokens=KNOTS,
        dense_us=_rounded(dense),
        collective_us=_rounded(collective),
        head_us=_rounded(head),
        decode_us=round(decode.step, 3),
        decode_request_us=round(decode.request, 5),
        decode_context_ns=round(decode.context * 1e3 * cache, 6),
        prefill_chunk_us=round(prefill.chunk, 3),
        prefill_pair_ns=round(prefill.pair * 1e3, 8),
    )


def _rounded(values: Floats) -> tuple[float, ...]:
    return tuple(round(value, 2) for value in values.tolist())
