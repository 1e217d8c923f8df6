"""Curves and fits for any points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.profiler.fit.grid import (
    Floats,
    bracket,
    curve_at_knots,
    log_log,
    non_negative,
    rising,
)

times = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=30)
KNOTS = (1, 2, 4, 8, 16, 32, 64)


@given(times)
def test_a_rising_curve_never_falls_and_keeps_its_mean(ys: list[float]) -> None:
    """A step with more tokens would take less time, or all steps be made longer."""
    found = rising(np.array(ys), np.ones(len(ys)))
    assert np.all(np.diff(found) >= 0)
    assert found.mean() == pytest.approx(np.mean(ys))
    assert rising(found, np.ones(len(ys))) == pytest.approx(found)


@given(st.lists(st.floats(0.1, 1e6), min_size=64, max_size=64))
def test_a_curve_at_knots_never_falls(ys: list[float]) -> None:
    """As above, whatever was measured."""
    xs = np.arange(1, 65, dtype=np.float64)
    found = curve_at_knots(xs, np.array(ys), KNOTS)
    assert len(found) == len(KNOTS)
    assert np.all(np.diff(found) >= -1e-9)


@given(st.floats(0.1, 100), st.floats(0, 10))
def test_a_straight_line_is_its_own_curve(floor: float, slope: float) -> None:
    """What is measured without noise would be changed by the fit."""
    xs = np.arange(1, 65, dtype=np.float64)
    found = curve_at_knots(xs, floor + slope * xs, KNOTS)
    assert found == pytest.approx([floor + slope * knot for knot in KNOTS], rel=1e-6)


@given(times, st.floats(0.5, 1e4))
def test_between_points_stays_between(ys: list[float], at: float) -> None:
    """An interpolation that overshoots makes up times that nobody measured."""
    xs: Floats = 2.0 ** np.arange(len(ys), dtype=np.float64)
    values = log_log(xs, np.array(ys), np.array([at]))
    assert log_log(xs, np.array(ys), xs) == pytest.approx(ys)
    if at <= xs[-1]:
        assert min(ys) * (1 - 1e-9) <= values[0] <= max(ys) * (1 + 1e-9)
    else:
        assert values[0] == pytest.approx(ys[-1] * at / xs[-1])


@given(st.sets(st.integers(1, 10_000), min_size=1), st.floats(1, 20_000))
def test_a_bracket_holds_its_number(numbers: set[int], at: float) -> None:
    """Matrices would be interpolated between the wrong sizes."""
    values = sorted(numbers)
    low, high, share = bracket(values, at)
    assert low in numbers
    assert high in numbers
    assert 0 <= share <= 1
    if values[0] <= at <= values[-1]:
        assert low <= at <= high
        assert low ** (1 - share) * high**share == pytest.approx(at)


@given(
    st.lists(st.floats(0, 100), min_size=3, max_size=3),
    st.lists(
        st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)),
        min_size=6,
        max_size=20,
    ),
)
def test_non_negative_coefficients_fit_what_was_made_of_them(
    true: list[float], rows: list[tuple[float, float, float]]
) -> None:
    """A coefficient below zero makes steps faster with more work; one lost, steps too short."""
    matrix = np.array(rows)
    wanted = matrix @ np.array(true)
    found = non_negative(matrix, wanted)
    assert np.all(found >= 0)
    assert matrix @ found == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_no_coefficient_below_zero_though_it_would_fit_better() -> None:
    """Falling times are put down to noise, not to requests that give time back."""
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = non_negative(matrix, np.array([3.0, 2.0, 1.0]))
    assert found.tolist() == pytest.approx([2.0, 0.0])
