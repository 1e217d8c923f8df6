"""Rows of the operator tables that no fit has seen, as operators and as steps.

A held-out attention row is put into a whole step: projections, all-reduces and head as the tables
have them with nothing held out, the attention as this row measured it, no overheads. The profile
predicts the same step. So what is judged is the form of the model (curves through knots, attention
linear in requests and tokens) and its coefficients, on rows that they were not fitted to.

Matrices of sizes between those measured are interpolated on both sides; ``gemms_between`` judges
that.
"""

from collections.abc import Iterator
from itertools import groupby

import msgspec
import numpy as np

from services.profiler.fit.attention import BATCH_MAX, CHUNKS_MAX, CONTEXT_MAX
from services.profiler.fit.build import FP8_BYTES, Fitted, Tables
from services.profiler.fit.gpus import KINDS, GpuKind
from services.profiler.fit.grid import Floats
from services.profiler.fit.layer import KNOTS, Shard, collective_us, dense_us, head_us
from services.profiler.fit.overheads import NONE
from services.profiler.fit.rows import AttentionRow, GemmRow, chosen
from services.profiler.fit.tables import GemmTable
from services.profiler.fit.validation.compared import Comparison
from shared.cost.profile import Profile
from shared.cost.step import PS_PER_US, Prefill, StepModel, pairs, step_model
from shared.hardware import Parallelism

SOURCE = "operator tables, held out"
CALIBRATED = "all but these rows"
TOKENS_MAX = KNOTS[-1]
GEMM_SIZE_MIN = 512
"""Smaller matrices are in no model that is served."""


def gemms(tables: Tables, kind: GpuKind) -> Comparison:
    """Single projections, interpolated from those that were not held out."""
    found: list[tuple[float, float]] = []
    rows = tables.rows(kind)
    for precision in ("bfloat16", "fp8") if kind.fp8 else ("bfloat16",):
        table = GemmTable(rows.fitted().gemms, precision)
        held_out = sorted(
            (row for row in rows.gemms if row.precision == precision and _counts(row)),
            key=lambda row: (row.n, row.k, row.m),
        )
        found += _against(table, held_out)
    return Comparison(SOURCE, "one GEMM", kind.name, "", found, CALIBRATED)


def gemms_between(tables: Tables, kind: GpuKind) -> Comparison:
    """Whole matrix sizes left out, and interpolated from others: what models of other sizes get."""
    found: list[tuple[float, float]] = []
    for precision in ("bfloat16", "fp8") if kind.fp8 else ("bfloat16",):
        rows = [row for row in tables.rows(kind).gemms if row.precision == precision]
        left_out = [row for row in rows if chosen("matrix", row.n, row.k)]
        table = GemmTable((row for row in rows if not chosen("matrix", row.n, row.k)), precision)
        counted = sorted(
            (row for row in left_out if min(row.n, row.k) >= GEMM_SIZE_MIN and _step_size(row)),
            key=lambda row: (row.n, row.k, row.m),
        )
        found += _against(table, counted)
    return Comparison(
        SOURCE, "one GEMM of unmeasured size", kind.name, "", found, "all but these sizes"
    )


def _against(table: GemmTable, rows: list[GemmRow]) -> Iterator[tuple[float, float]]:
    """``rows`` sorted by matrix."""
    for (n, k), group in groupby(rows, key=lambda row: (row.n, row.k)):
        ones = list(group)
        ms: Floats = np.array([row.m for row in ones], dtype=np.float64)
        for row, us in zip(ones, table.us(ms, n, k).tolist(), strict=True):
            yield us, row.us


def _step_size(row: GemmRow) -> bool:
    return row.m <= TOKENS_MAX


def _counts(row: GemmRow) -> bool:
    return row.held_out and min(row.n, row.k) >= GEMM_SIZE_MIN and _step_size(row)


def steps(tables: Tables, fitted: Fitted, kind: GpuKind) -> Iterator[Comparison]:
    """Decode steps and prompts, for each model whose very heads were measured."""
    rows = [row for row in tables.rows(kind).attentions if row.held_out and _step(row)]
    for (gpu, name), profile in sorted(fitted.profiles.items()):
        if gpu != kind.name:
            continue
        for phase, what in (("decode", "decode step"), ("prefill", "prompt step")):
            found = [
                pair
                for times in profile.times
                for pair in _pairs(
                    tables, fitted, profile, times.tp, [row for row in rows if row.phase == phase]
                )
            ]
            if found:
                yield Comparison(SOURCE, what, gpu, name, found, CALIBRATED)


def _step(row: AttentionRow) -> bool:
    if row.phase == "prefill":
        return row.batch <= CHUNKS_MAX and row.batch * row.tokens <= TOKENS_MAX
    return row.batch <= BATCH_MAX and row.tokens <= CONTEXT_MAX


def _pairs(
    tables: Tables, fitted: Fitted, profile: Profile, tp: int, rows: list[AttentionRow]
) -> Iterator[tuple[float, float]]:
    """(predicted, measured) microseconds of one parallelism."""
    facts, kind = profile.model_facts, KINDS[profile.gpu]
    shard = Shard(facts, tp)
    alike = [row for row in rows if (row.heads, row.kv_heads) == (shard.heads, shard.kv_heads)]
    if not alike:
        return
    bare = msgspec.structs.replace(profile, overheads=NONE)
    model = step_model(bare, fitted.gpus[profile.gpu], Parallelism(tp))
    whole = tables.operators(kind, fp8=facts.weight_bytes == FP8_BYTES, whole=True)
    tokens = [row.batch * (row.tokens if row.phase == "prefill" else 1) for row in alike]
    counts: Floats = np.array(tokens, dtype=np.float64)
    sampled: Floats = np.array([row.batch for row in alike], dtype=np.float64)
    layer = dense_us(shard, whole, counts) + collective_us(shard, whole, counts)
    attention: Floats = np.array([row.us for row in alike], dtype=np.float64)
    measured = facts.layers * (layer + attention) + head_us(shard, whole, sampled)
    for row, us in zip(alike, measured.tolist(), strict=True):
        yield _predicted_us(model, row), us


def _predicted_us(model: StepModel, row: AttentionRow) -> float:
    if row.phase == "decode":
        return model.step_ps(row.batch, row.batch * row.tokens) / PS_PER_US
    prompts = Prefill(
        tokens=row.batch * row.tokens,
        chunks=row.batch,
        pairs=row.batch * pairs(0, row.tokens),
        ending=row.batch,
    )
    return model.step_ps(0, 0, prompts) / PS_PER_US
