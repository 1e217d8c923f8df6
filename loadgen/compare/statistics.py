"""Means and paired differences with confidence intervals, from few runs.

Runs are paired: run i of one policy and run i of another had the same arrivals and the same seed,
so that what a busy seed costs both cancels in the difference. Over n pairs the mean difference d
has the interval d +- t(0.975, n-1) s / sqrt(n) (Student's t, which holds where differences are
about normal), and so has the mean of the logarithms of the ratios, whose exponential is the
ratio's. Intervals are 95 % each; that one among many is wrong by chance is not corrected for.
"""

import math
from collections.abc import Sequence

import msgspec

CONFIDENCE = 0.95
_FRACTION_ROUNDS_MAX = 300
_TINY = 1e-300


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over ``count`` runs and its interval; ``low`` and ``high`` are None for one run."""

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean and its interval; None if there is no value, or one is missing: a latency that no
    number can tell (a request that never ended) must not vanish from the mean."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) != len(values):
        return None
    count = len(known)
    mean = math.fsum(known) / count
    if count == 1:
        return Estimate(mean=mean, low=None, high=None, count=1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (count - 1)
    half = t_quantile((1.0 + CONFIDENCE) / 2.0, count - 1) * math.sqrt(variance / count)
    return Estimate(mean=mean, low=mean - half, high=mean + half, count=count)


def paired_difference(
    values: Sequence[float | None], references: Sequence[float | None]
) -> Estimate | None:
    """Of ``values[i] - references[i]``."""
    pairs = list(zip(values, references, strict=True))
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def paired_ratio(
    values: Sequence[float | None], references: Sequence[float | None]
) -> Estimate | None:
    """The geometric mean of ``values[i] / references[i]``; None unless all are above 0."""
    pairs = list(zip(values, references, strict=True))
    if not all(a is not None and b is not None and a > 0 and b > 0 for a, b in pairs):
        return None
    logs = estimate([math.log(a) - math.log(b) for a, b in pairs if a and b])
    if logs is None:
        return None
    return Estimate(
        mean=math.exp(logs.mean),
        low=None if logs.low is None else math.exp(logs.low),
        high=None if logs.high is None else math.exp(logs.high),
        count=logs.count,
    )


def t_quantile(share: float, freedom: int) -> float:
    """The value below which Student's t with ``freedom`` degrees lies with chance ``share``; by
    bisection to the last digit, for a share of at least a half."""
    assert 0.5 <= share < 1.0, share  # noqa: PLR2004  # the other half is its mirror image
    assert freedom >= 1, freedom
    low, high = 0.0, 1.0
    while t_cumulative(high, freedom) < share:
        low, high = high, high * 2.0
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle
        low, high = (middle, high) if t_cumulative(middle, freedom) < share else (low, middle)


def t_cumulative(value: float, freedom: int) -> float:
    """The chance that Student's t with ``freedom`` degrees is at most ``value``, which is >= 0."""
    x = freedom / (freedom + value * value)
    return 1.0 - 0.5 * _beta_share(freedom / 2.0, 0.5, x)


def _beta_share(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b  # converges fast on this side


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's method, modified (Press et al., Numerical Recipes, section 6.4)."""
    c, d = 1.0, 1.0 / _nonzero(1.0 - (a + b) * x / (a + 1.0))
    result = d
    for m in range(1, _FRACTION_ROUNDS_MAX):
        before = result
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / _nonzero(1.0 + numerator * d)
            c = _nonzero(1.0 + numerator / c)
            result *= c * d
        if abs(result - before) <= 1e-16 * abs(result):
            break
    return result


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
