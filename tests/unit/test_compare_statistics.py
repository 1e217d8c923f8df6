"""Statistics of a comparison, against numbers worked out by hand and closed forms."""

import math

import pytest

from loadgen.compare.statistics import (
    estimate,
    paired_difference,
    paired_ratio,
    t_cumulative,
    t_quantile,
)


@pytest.mark.parametrize("share", [0.6, 0.9, 0.975, 0.995])
def test_quantiles_of_one_and_two_degrees_have_closed_forms(share: float) -> None:
    """Every interval would be too wide or too narrow."""
    assert t_quantile(share, 1) == pytest.approx(math.tan(math.pi * (share - 0.5)), rel=1e-9)
    two = (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    assert t_quantile(share, 2) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize(("value", "freedom"), [(0.5, 4), (2.0, 4), (7.0, 4)])
def test_four_degrees_have_a_closed_form(value: float, freedom: int) -> None:
    """The usual case, five seeds, would be off."""
    x = value / math.sqrt(4 + value * value)
    assert t_cumulative(value, freedom) == pytest.approx(0.5 + 0.75 * (x - x**3 / 3), abs=1e-12)


def test_published_table_and_normal_limit() -> None:
    """A continued fraction that stops early shows far out and with many degrees only."""
    assert t_quantile(0.975, 4) == pytest.approx(2.776445, abs=1e-6)
    assert t_quantile(0.975, 29) == pytest.approx(2.045230, abs=1e-6)
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959988, abs=1e-5)
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-9)


def test_interval_of_a_mean_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, half width 4.3027 / sqrt(3)."""
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert found.mean == 2.0
    assert found.low == pytest.approx(2.0 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2.0 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.count == 3


def test_pairs_cancel_what_seeds_cost_both() -> None:
    """Noise common to both would hide a difference that is in every pair."""
    base = [10.0, 50.0, 90.0]
    found = paired_difference([value + 1.0 for value in base], base)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_ratio_is_the_geometric_mean_of_pairs() -> None:
    """A ratio of means would let the largest seed decide; and twice must undo half."""
    found = paired_ratio([2.0, 8.0], [1.0, 2.0])
    back = paired_ratio([1.0, 2.0], [2.0, 8.0])
    assert found is not None
    assert back is not None
    assert found.mean == pytest.approx(math.sqrt(8.0))
    assert found.mean * back.mean == pytest.approx(1.0)
    assert back.low is not None
    assert found.high == pytest.approx(1.0 / back.low)


def test_one_run_has_no_interval() -> None:
    """A single seed would look certain."""
    found = estimate([3.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (3.0, None, None)


def test_a_missing_value_is_never_left_out() -> None:
    """The runs in which requests never ended would vanish from the mean that they spoil."""
    assert estimate([1.0, None]) is None
    assert estimate([]) is None
    assert paired_difference([1.0, None], [1.0, 1.0]) is None
    assert paired_ratio([1.0, 0.0], [1.0, 1.0]) is None
