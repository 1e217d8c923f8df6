"""The scheduler's memory of arrivals: bounded, in order, without gaps."""

import pytest

from services.scheduler.past import FLOOR, FLOOR_WINDOWS_MIN, KEPT_S, RECENT_S, Past
from shared.messages.demand import DemandReport, TypeArrivals


def report(start_s: float, rps: float = 1.0, *, model_id: str = "m") -> DemandReport:
    return DemandReport(
        model_id=model_id,
        window_start_s=start_s + 60.0,
        window_s=10.0,
        settled_start_s=start_s,
        settled_s=10.0,
        settled=(TypeArrivals(request_type=3, arrivals_rps=rps),),
    )


def rates(past: Past) -> list[float]:
    return [window.arrivals_rps[3] for window in past.windows.get("m", ())]


def test_windows_are_kept_in_order_and_once() -> None:
    """A burst that is told twice would be rehearsed as two."""
    past = Past(["m"])
    for number in (0, 1, 1, 0, 2):
        past.window(report(10.0 * number, rps=float(number)))
    assert rates(past) == [0.0, 1.0, 2.0]


def test_a_gap_begins_a_new_past() -> None:
    """What was before would be played back to back with what was long after."""
    past = Past(["m"])
    past.window(report(0.0, rps=1.0))
    past.window(report(10.0, rps=2.0))
    past.window(report(300.0, rps=3.0))
    assert rates(past) == [3.0]


def test_a_clock_set_back_is_believed() -> None:
    """All reports of an hour would count as late."""
    past = Past(["m"])
    past.window(report(50_000.0, rps=1.0))
    past.window(report(10.0, rps=2.0))
    assert rates(past) == [2.0]


def test_the_past_is_bounded() -> None:
    """A scheduler that runs for a month would remember it."""
    past = Past(["m"])
    for number in range(1000):
        past.window(report(10.0 * number, rps=float(number)))
    assert len(rates(past)) == KEPT_S / 10.0
    assert rates(past)[-1] == 999.0


@pytest.mark.parametrize(
    "odd",
    [
        DemandReport(model_id="m", window_start_s=0.0, window_s=10.0),
        report(float("nan")),
        report(0.0, model_id="stranger"),
    ],
)
def test_what_says_nothing_is_left_out(odd: DemandReport) -> None:
    """A number that is none would poison every rehearsal."""
    past = Past(["m"])
    past.window(odd)
    assert not past.windows
    past.window(report(0.0, rps=float("inf")))
    assert past.windows["m"][0].arrivals_rps == {}


def test_what_arrived_recently_bounds_forecasts_from_below() -> None:
    """Demand would seem to cease just when it is too much for the replicas, which end little."""
    past = Past(["m"])
    assert past.floors("m") == past.floors("stranger") == {}
    for number in range(FLOOR_WINDOWS_MIN - 1):
        past.window(report(10.0 * number, rps=8.0))
    assert past.floors("m") == {}, "too little to go by"
    past.window(report(10.0 * (FLOOR_WINDOWS_MIN - 1), rps=2.0))
    mean = (8.0 * (FLOOR_WINDOWS_MIN - 1) + 2.0) / FLOOR_WINDOWS_MIN
    assert past.floors("m") == {3: pytest.approx(FLOOR * mean)}
    for number in range(FLOOR_WINDOWS_MIN, FLOOR_WINDOWS_MIN + int(RECENT_S / 10.0)):
        past.window(report(10.0 * number, rps=1.0))
    assert past.floors("m") == {3: pytest.approx(FLOOR)}, "what is long past counts no more"
