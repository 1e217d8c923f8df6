"""Made-up operator tables whose every time can be worked out by hand.

A GEMM takes m n k / 1e6 us. Decode attention takes 10 + 2 b + 0.001 b t us whatever the heads, per
8 KV heads; prefill 5 us a chunk and 0.001 us a pair. NCCL takes e / 1,000 us, vLLM's own all-reduce
a tenth of it.
"""

import csv
import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

from services.profiler.fit.layer import Operators, operators
from services.profiler.fit.rows import AttentionRow, CollectiveRow, GemmRow
from services.profiler.fit.tables import Measured
from shared.cost.profile import ModelFacts

SIZES = (64, 256, 1024, 4096)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SPLITS = ((1, 1), (2, 2), (4, 4), (8, 8), (8, 2), (16, 4), (32, 8), (64, 8))
BYTES_PER_S = 1e12

SMALL = ModelFacts(
    layers=4, hidden=256, heads=8, kv_heads=8, head_dim=128, ffn=1024, vocab=640, gated=True
)


def gemm_us(m: float, n: float, k: float) -> float:
    return m * n * k / 1e6


def decode_us(batch: float, tokens: float) -> float:
    return 10 + 2 * batch + 0.001 * batch * tokens


def prefill_us(chunks: float, tokens: float) -> float:
    return 5 * chunks + 0.001 * chunks * tokens * (tokens + 1) / 2


def made_up() -> Measured:
    gemms = [
        GemmRow(precision, m, n, k, gemm_us(m, n, k) / (2 if precision == "fp8" else 1))
        for precision in ("bfloat16", "fp8")
        for m in TOKENS
        for n in SIZES
        for k in SIZES
    ]
    attentions = [
        AttentionRow(phase, batch, tokens, heads, kv_heads, us(batch, tokens))
        for phase, us in (("decode", decode_us), ("prefill", prefill_us))
        for batch in (1, 2, 4, 8, 16, 64, 256)
        for tokens in (16, 128, 1024, 8192)
        for heads, kv_heads in SPLITS
    ]
    collectives = [
        CollectiveRow(kind, library, gpus, elements, elements / per_us)
        for kind, library, per_us in (
            ("all_reduce", "nccl", 1e3), ("all_reduce", "vllm", 1e4), ("all_gather", "nccl", 1e3),
        )
        for gpus in (2, 4, 8)
        for elements in (256, 4096, 65536, 1 << 20, 1 << 24)
    ]  # fmt: skip
    return Measured(tuple(gemms), tuple(attentions), tuple(collectives))


def made_up_operators(*, fp8: bool = False, nvlink: bool = True) -> Operators:
    return operators(made_up(), fp8=fp8, nvlink=nvlink, memory_bytes_per_s=BYTES_PER_S)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
