"""Attention of one layer as the step model counts it: linear in requests, tokens and pairs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.profiler.fit.grid import Floats, bracket, non_negative
from services.profiler.fit.tables import AttentionPoints, AttentionTable
from shared.errors import ConfigInvalid

BATCH_MAX, CONTEXT_MAX = 1024, 32768
"""Decode rows beyond are no steps that an engine takes."""
CHUNKS_MAX, STEP_TOKENS_MAX = 16, 32768

Beside = Callable[[Floats], Floats]
"""Time of all else in a layer by tokens: errors count relative to the whole, not to attention."""


@dataclass(frozen=True, slots=True)
class Decode:
    """In microseconds: for any, for each request, for each token of context."""

    step: float
    request: float
    context: float

    def us(self, batch: Floats, context: Floats) -> Floats:
        return self.step + self.request * batch + self.context * context


@dataclass(frozen=True, slots=True)
class Prefill:
    """In microseconds: for each chunk, for each pair of a token and one it attends to."""

    chunk: float
    pair: float

    def us(self, chunks: Floats, pairs: Floats) -> Floats:
        return self.chunk * chunks + self.pair * pairs


def fit_decode(table: AttentionTable, heads: float, kv_heads: float, beside: Beside) -> Decode:
    """Raises ConfigInvalid if nothing like this split of heads was measured."""

    def fit(points: AttentionPoints) -> Floats:
        batch, context = points.batch, points.batch * points.tokens
        kept = (batch <= BATCH_MAX) & (points.tokens <= CONTEXT_MAX)
        matrix = np.stack([np.ones(len(batch)), batch, context], axis=1)[kept]
        return _relative(matrix, points.us[kept], beside(batch[kept]))

    step, request, context = _between(table, heads, kv_heads, fit).tolist()
    return Decode(step, request, context)


def fit_prefill(table: AttentionTable, heads: float, kv_heads: float, beside: Beside) -> Prefill:
    """Raises ConfigInvalid if nothing like this split of heads was measured."""

    def fit(points: AttentionPoints) -> Floats:
        tokens = points.batch * points.tokens
        kept = (points.batch <= CHUNKS_MAX) & (tokens <= STEP_TOKENS_MAX)
        pairs = points.batch * points.tokens * (points.tokens + 1) / 2
        matrix = np.stack([points.batch, pairs], axis=1)[kept]
        return _relative(matrix, points.us[kept], beside(tokens[kept]))

    chunk, pair = _between(table, heads, kv_heads, fit).tolist()
    return Prefill(chunk, pair)


def _relative(matrix: Floats, us: Floats, beside: Floats) -> Floats:
    whole = us + beside
    return non_negative(matrix / whole[:, None], us / whole)


def _between(
    table: AttentionTable, heads: float, kv_heads: float, fit: Callable[[AttentionPoints], Floats]
) -> Floats:
    """The coefficients at the measured numbers of heads around ours, interpolated."""
    known, scale = likeness(table, heads, kv_heads)
    alike = heads * known / kv_heads
    low, high, share = bracket(table.heads_with(known), alike)
    found = [fit(_scaled(_points(table, place, known), scale)) for place in (low, high)]
    return found[0] * (1 - share) + found[1] * share


def likeness(table: AttentionTable, heads: float, kv_heads: float) -> tuple[int, float]:
    """Measured KV heads, and how many of our requests do the work of one measured request.

    Kernels spread (request, KV head) pairs over the GPU: b requests of 36 KV heads are the work of
    4.5 b requests of 8 with as many query heads each. Decode was measured with up to 8 KV heads,
    models of plain multi-head attention have more. Heads of another size than those measured count
    as a share of one.
    """
    kv_known = {kv for kv in range(1, 1025) if table.heads_with(kv)}
    for known in sorted(kv_known, key=lambda kv: (abs(np.log(kv / kv_heads)), kv)):
        measured = table.heads_with(known)
        if measured[0] <= heads * known / kv_heads <= measured[-1]:
            return known, known / kv_heads
    remedy = f"{heads:g} query heads on {kv_heads:g} KV heads: nothing like it was measured"
    raise ConfigInvalid(field="heads", value=heads, remedy=remedy)


def _points(table: AttentionTable, heads: int, kv_heads: int) -> AttentionPoints:
    found = table.points(heads, kv_heads)
    assert found is not None
    return found


def _scaled(points: AttentionPoints, scale: float) -> AttentionPoints:
    return AttentionPoints(points.batch * scale, points.tokens, points.us)
