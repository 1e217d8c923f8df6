"""From measured steps to the coefficients of ``shared.cost.step``, on one GPU.

Each row is one equation in the terms of the step model, so the fit is exactly as expressive as the
predictor. One model on one shape cannot tell all terms apart; what cannot be told goes to the
layers, each an equal share: ``step_us``, ``request_us`` and ``chunk_us`` are 0, the constant of
every step is in ``dense_us``, that of a decoding request in ``decode_request_us``, that of a chunk
in ``prefill_chunk_us``. ``head_us`` is what grows with sampled tokens. So the step times of this
shape are right, and those of other shapes of the same model must not be derived from them.

All terms are non-negative, and curves therefore never fall. Residuals are relative and absolute
(not squared): long steps count no more than short ones, and a disturbed row pulls little.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from services.worker.measure.ledger import StepShape, SweepFailed
from services.worker.measure.nnls import Floats, non_negative_least_squares
from services.worker.measure.sweep import Row
from shared.cost.profile import TensorTimes

ROWS_PER_TERM_MIN = 1
REWEIGHTINGS = 12
RESIDUAL_MIN = 0.005
"""Relative residuals below this count alike: a least absolute fit by reweighting divides by them
(Schlossmacher, 1973)."""
DENSE_MIN_US = 1e-3
"""A layer takes some time even where all of it was put down to something else."""


def fit(rows: Sequence[Row], layers: int) -> TensorTimes:
    """Raises SweepFailed if there are fewer rows than terms."""
    knots = _knots([row.shape for row in rows])
    matrix = np.array([_terms(row.shape, knots, layers) for row in rows], dtype=np.float64)
    if len(rows) < ROWS_PER_TERM_MIN * matrix.shape[1]:
        raise SweepFailed(
            f"{len(rows)} kinds of steps were timed, {matrix.shape[1]} terms are wanted: "
            "raise --seconds"
        )
    taken_us = np.array([row.time_s * 1e6 for row in rows])
    relative = matrix / taken_us[:, None]
    weights = np.ones(len(rows))
    found = np.zeros(matrix.shape[1])
    for _ in range(REWEIGHTINGS):
        found = non_negative_least_squares(relative * weights[:, None], weights)
        weights = np.abs(relative @ found - 1.0).clip(min=RESIDUAL_MIN) ** -0.5
    return _times(found, knots)


def _knots(shapes: Sequence[StepShape]) -> tuple[int, ...]:
    """Powers of two from 1 to the largest step, and that one; a knot without a row between it and
    the one before could not be placed."""
    tokens = sorted({shape.tokens for shape in shapes})
    largest = tokens[-1]
    powers = [1 << bit for bit in range(1, largest.bit_length()) if 1 << bit < largest]
    knots = [1]
    for knot in [*powers, largest]:
        if any(knots[-1] < count <= knot for count in tokens):
            knots.append(knot)
    return tuple(knots)


def _terms(shape: StepShape, knots: tuple[int, ...], layers: int) -> list[float]:
    """Coefficients of the unknowns, in the order in which ``_times`` reads them."""
    prefill = shape.prefill
    dense = [
        max(0, min(shape.tokens, after) - before) * layers for before, after in pairwise(knots)
    ]
    return [
        layers,
        *dense,
        layers * bool(shape.batch),
        layers * shape.batch,
        layers * shape.context,
        layers * prefill.chunks,
        layers * prefill.pairs,
        bool(shape.sampled),
        shape.sampled,
    ]


def _times(found: Floats, knots: tuple[int, ...]) -> TensorTimes:
    values: list[float] = found.tolist()
    constant, slopes = values[0], values[1 : len(knots)]
    decode, request, context, chunk, pair, head, sampled = values[len(knots) :]
    dense = [max(constant, DENSE_MIN_US)]
    for slope, (before, after) in zip(slopes, pairwise(knots), strict=True):
        dense.append(dense[-1] + slope * (after - before))
    return TensorTimes(
        tp=1,
        tokens=knots,
        dense_us=_rounded(dense),
        collective_us=(0.0,) * len(knots),
        head_us=_rounded([head + sampled * knot for knot in knots]),
        decode_us=round(decode, 4),
        decode_request_us=round(request, 4),
        decode_context_ns=round(context * 1e3, 4),
        prefill_chunk_us=round(chunk, 4),
        prefill_pair_ns=round(pair * 1e3, 6),
    )


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
