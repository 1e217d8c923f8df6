"""Least squares with non-negative coefficients: no operator takes less than no time."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROUNDS_PER_COLUMN_MAX = 30
_TOLERANCE = 1e-10


def non_negative_least_squares(matrix: Floats, values: Floats) -> Floats:
    """The x >= 0 that minimises |matrix x - values|, by the active sets of Lawson and Hanson
    (Solving Least Squares Problems, 1974, chapter 23). Columns are scaled to unit length first, so
    that terms of unlike units compete fairly; a column of zeros gets 0."""
    lengths = np.linalg.norm(matrix, axis=0)
    scales = np.where(lengths > 0, lengths, 1.0)
    return _active_set(matrix / scales, values) / scales


def _active_set(matrix: Floats, values: Floats) -> Floats:
    columns = matrix.shape[1]
    x = np.zeros(columns)
    free = np.zeros(columns, dtype=np.bool_)
    tolerance = _TOLERANCE * max(1.0, float(np.abs(values).max(initial=0.0)))
    for _ in range(_ROUNDS_PER_COLUMN_MAX * columns):
        gradient = matrix.T @ (values - matrix @ x)
        candidates = np.where(free, -np.inf, gradient)
        best = int(candidates.argmax())
        if free.all() or candidates[best] <= tolerance:
            return x
        free[best] = True
        x = _step_within_bounds(matrix, values, x, free)
    return x


def _step_within_bounds(
    matrix: Floats, values: Floats, x: Floats, free: npt.NDArray[np.bool_]
) -> Floats:
    """From ``x`` towards the least squares solution over the free columns, fixing at 0 (in
    ``free`` too) whatever would turn negative on the way."""
    while True:
        wish = np.zeros_like(x)
        wish[free] = np.linalg.lstsq(matrix[:, free], values, rcond=None)[0]
        negative = free & (wish <= 0)
        if not negative.any():
            return wish
        gaps = x[negative] - wish[negative]
        share = float((x[negative] / np.where(gaps > 0, gaps, 1.0)).min())
        x = x + share * (wish - x)
        free &= x > _TOLERANCE
        x = np.where(free, x, 0.0)
