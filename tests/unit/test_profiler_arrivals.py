"""Arrivals by the window in which they came, told once nearly all of them have ended."""

import pytest

from services.profiler.arrivals import Arrivals

SETTLE = 3


def turned(arrivals: Arrivals, *at_s: float) -> list[tuple[float, float, dict[int, float]]]:
    """What is told when windows begin at these times."""
    told = [arrivals.turn(now_s) for now_s in at_s]
    return [
        (start_s, length_s, {kind.request_type: kind.arrivals_rps for kind in kinds})
        for start_s, length_s, kinds in filter(None, told)
    ]


def test_a_request_counts_in_the_window_in_which_it_came() -> None:
    """A burst would look no higher than what replicas can serve, and as long as they take."""
    arrivals = Arrivals(settle_windows=SETTLE, start_s=0.0)
    assert turned(arrivals, 10.0, 20.0, 30.0) == []
    for _ in range(50):
        arrivals.add(4, arrived_s=12.0)  # they end in the fourth window
    arrivals.add(5, arrived_s=30.0)
    assert turned(arrivals, 40.0, 50.0, 60.0, 70.0) == [
        (0.0, 10.0, {}),
        (10.0, 10.0, {4: 5.0}),
        (20.0, 10.0, {}),
        (30.0, 10.0, {5: 0.1}),
    ]


def test_who_ends_very_late_counts_in_the_oldest_window() -> None:
    """Work would be lost from the record just when there is most of it."""
    arrivals = Arrivals(settle_windows=SETTLE, start_s=0.0)
    turned(arrivals, 10.0, 20.0, 30.0, 40.0)
    arrivals.add(1, arrived_s=3.0)
    assert turned(arrivals, 50.0) == [(10.0, 10.0, {1: pytest.approx(0.1)})]


def test_only_so_many_windows_are_kept() -> None:
    """A profiler that runs for a month would remember it."""
    arrivals = Arrivals(settle_windows=SETTLE, start_s=0.0)
    for window in range(1, 100):
        arrivals.turn(10.0 * window)
        assert len(arrivals) <= SETTLE + 1


def test_types_that_become_one_are_counted_as_one_and_given_back_numbers_begin_anew() -> None:
    """A new type would have the past of a former one."""
    arrivals = Arrivals(settle_windows=SETTLE, start_s=0.0)
    for number, count in ((1, 10), (2, 20), (3, 40)):
        for _ in range(count):
            arrivals.add(number, arrived_s=5.0)
    arrivals.merge(1, into=2)
    arrivals.forget([3, 9])
    assert turned(arrivals, 10.0, 20.0, 30.0, 40.0) == [(0.0, 10.0, {2: 3.0})]


def test_a_clock_that_stood_still_tells_nothing() -> None:
    """A rate would be divided by no time at all."""
    arrivals = Arrivals(settle_windows=1, start_s=0.0)
    arrivals.add(1, arrived_s=0.0)
    assert turned(arrivals, 0.0, 0.0) == []
    arrivals.add(2, arrived_s=0.0)
    assert turned(arrivals, 10.0, 20.0) == [(0.0, 10.0, {2: pytest.approx(0.1)})]
