"""Curves through measured points."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_log(xs: Floats, ys: Floats, at: Floats) -> Floats:
    """Between points straight lines on logarithmic axes; before the first as the first (what does
    not get shorter is the launch), after the last in proportion to x."""
    inside = np.exp(np.interp(np.log(at), np.log(xs), np.log(ys)))
    return inside * np.maximum(1.0, at / xs[-1])


def bracket(values: Sequence[int], at: float) -> tuple[int, int, float]:
    """The two of ascending ``values`` around ``at``, and how far ``at`` is from the first to the
    second on a logarithmic axis; twice the nearest one, and 0, outside of them."""
    if at <= values[0]:
        return values[0], values[0], 0.0
    if at >= values[-1]:
        return values[-1], values[-1], 0.0
    index = int(np.searchsorted(np.array(values), at, side="right"))
    low, high = values[index - 1], values[index]
    return low, high, float(np.log(at / low) / np.log(high / low))


def rising(ys: Floats, weights: Floats) -> Floats:
    """The nearest non-decreasing curve by weighted least squares (pool adjacent violators,
    Barlow et al., 1972): a step with more tokens never takes less time."""
    means: list[float] = []
    sums: list[float] = []
    counts: list[int] = []
    for y, weight in zip(ys.tolist(), weights.tolist(), strict=True):
        means.append(y)
        sums.append(weight)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, total, count = means.pop(), sums.pop(), counts.pop()
            means[-1] = (means[-1] * sums[-1] + mean * total) / (sums[-1] + total)
            sums[-1] += total
            counts[-1] += count
    return np.repeat(np.array(means), counts)


def curve_at_knots(xs: Floats, ys: Floats, knots: Sequence[int]) -> Floats:
    """Values at ``knots`` of the rising, piecewise linear curve nearest to the points by relative
    least squares. Knots before the first point are as the first point, those after the last in
    proportion to x; every knot needs a point at or near it, which the caller adds."""
    places = np.array(knots, dtype=np.float64)
    hats = np.maximum(0.0, _hats(places, xs))
    values: Floats = np.linalg.lstsq(hats / ys[:, None], np.ones(len(ys)), rcond=None)[0].astype(
        np.float64
    )
    shares = (hats / ys[:, None] ** 2).sum(axis=0)
    return rising(values, np.maximum(shares, 1e-30))


def _hats(knots: Floats, xs: Floats) -> Floats:
    """Row by point, column by knot: the weight of each knot's value in the value at the point."""
    return np.stack([np.interp(xs, knots, unit) for unit in np.eye(len(knots))], axis=1)


def non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """Least squares with coefficients of at least 0, for few columns: the best of the plain least
    squares solutions over all subsets of columns that need no negative one."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(wanted @ wanted)
    for subset in range(1, 1 << columns):
        chosen = [c for c in range(columns) if subset >> c & 1]
        found = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
        if found.min() < 0:
            continue
        residual = matrix[:, chosen] @ found - wanted
        error = float(residual @ residual)
        if error < least:
            best, least = np.zeros(columns), error
            best[chosen] = found
    return best
