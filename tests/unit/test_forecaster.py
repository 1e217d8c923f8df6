"""The forecaster: its two predictors, their race, and what a missing window means."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.forecaster.config import ForecasterConfig
from services.forecaster.core import Forecaster
from services.forecaster.predictors import spread
from shared.core import (
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.errors import ConfigInvalid
from shared.messages.demand import DemandReport, ForecasterState, ForecastReport, TypeDemand


def demand_of(number: int, rps: float, *, tokens: float = 100.0) -> TypeDemand:
    return TypeDemand(
        request_type=number,
        requests=int(rps * 10),
        arrivals_rps=rps,
        input_tokens_mean=tokens,
        output_tokens_mean=tokens,
        input_tokens_centroid=tokens,
        output_tokens_centroid=tokens,
    )


def report_of(window: int, *rps: float, model_id: str = "m") -> DemandReport:
    return DemandReport(
        model_id=model_id,
        window_start_s=10.0 * window,
        window_s=10.0,
        types=tuple(demand_of(number, value) for number, value in enumerate(rps)),
    )


def forecaster_of(**config: Any) -> Forecaster:
    forecaster = Forecaster(ForecasterConfig(**config), unix_offset_s=0.0)
    forecaster.step(Started(), 0.0)
    forecaster.step(Loaded(key="forecaster"), 0.0)
    return forecaster


def forecasts(effects: list[Effect]) -> list[ForecastReport]:
    messages = [e.message for e in effects if isinstance(e, Publish)]
    return [m for m in messages if isinstance(m, ForecastReport)]


def feed(forecaster: Forecaster, series: Sequence[float | None]) -> ForecastReport:
    """One window per value, None for one that is missing; the last forecast."""
    last: list[ForecastReport] = []
    for window, rps in enumerate(series):
        if rps is not None:
            last = forecasts(forecaster.step(report_of(window, rps), 10.0 * window + 10.0))
            forecaster.check()
    (forecast,) = last
    return forecast


def test_the_first_report_already_gives_a_forecast() -> None:
    """The scheduler would be blind for minutes after each start."""
    forecast = feed(forecaster_of(), [5.0])
    (only,) = forecast.types
    assert (only.arrivals_rps, only.method, only.error_rps_mae) == (5.0, "last_value", None)
    assert (forecast.made_at_s, forecast.horizon_s) == (10.0, 30.0)


def test_the_average_wins_on_noise() -> None:
    """Plans would follow each window's chance."""
    (only,) = feed(forecaster_of(), [10.0, 20.0] * 20).types
    assert only.method == "ewma"
    assert 12.0 < only.arrivals_rps < 18.0
    assert only.error_rps_mae is not None
    assert only.error_rps_mae < 5.0


def test_the_last_value_wins_on_a_trend() -> None:
    """Plans would lag behind a morning's rise."""
    (only,) = feed(forecaster_of(), [float(i) for i in range(30)]).types
    assert (only.method, only.arrivals_rps) == ("last_value", 29.0)


def test_errors_are_those_of_the_horizon() -> None:
    """The published error would be of another forecast than the published one."""
    forecast = feed(forecaster_of(horizon_windows=2), [10.0, 20.0, 40.0])
    assert forecast.types[0].error_rps_mae == pytest.approx(abs(10.0 - 30.0))


def test_a_range_is_never_narrower_than_chance() -> None:
    """A plan for the 90th percentile of a steady rate would be one for its mean."""
    (only,) = feed(forecaster_of(horizon_windows=1), [9.0] * 30).types
    assert only.arrivals_rps_p10 is not None
    assert only.arrivals_rps_p90 is not None
    chance = 1.2816 * (9.0 / 10.0) ** 0.5
    assert only.arrivals_rps_p10 == pytest.approx(9.0 - chance)
    assert only.arrivals_rps_p90 == pytest.approx(9.0 + chance)


def test_a_range_follows_what_came() -> None:
    """Rates that jump both ways by more than chance would be planned for as if they stood."""
    (only,) = feed(forecaster_of(horizon_windows=1), [100.0, 200.0] * 20).types
    assert only.arrivals_rps_p10 is not None
    assert only.arrivals_rps_p90 is not None
    assert only.arrivals_rps_p10 < 110.0
    assert only.arrivals_rps_p90 > 190.0


def test_nothing_is_said_of_a_range_before_the_first_score() -> None:
    """A range made of nothing would be taken for knowledge."""
    (only,) = feed(forecaster_of(), [9.0]).types
    assert (only.arrivals_rps_p10, only.arrivals_rps_p90) == (None, None)


@given(errors=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80), chance=st.floats(0.0, 1e3))
def test_the_range_holds_the_forecast(errors: list[float], chance: float) -> None:
    """A median above the 90th percentile would plan for less than is expected."""
    below, above = spread(errors, chance_rps=chance)
    assert below <= 0.0 <= above


def test_a_missing_window_is_not_an_empty_one() -> None:
    """A restart of the profiler would look like a fall of the traffic to nothing."""
    (missed,) = feed(forecaster_of(), [10.0] * 8 + [None, None] + [10.0]).types
    assert (missed.arrivals_rps, missed.error_rps_mae) == (10.0, 0.0)
    (fell,) = feed(forecaster_of(), [10.0] * 8 + [0.0, 0.0] + [10.0]).types
    assert fell.error_rps_mae is not None
    assert fell.error_rps_mae > 0.0


def test_after_a_gap_the_next_window_counts_for_more() -> None:
    """After an hour away the average would still speak of the hour before."""
    config: dict[str, Any] = {"ewma_rate": 0.3, "horizon_windows": 1}
    near = forecaster_of(**config)
    far = forecaster_of(**config)
    feed(near, [10.0, 20.0])
    feed(far, [10.0] + [None] * 9 + [20.0])
    stored = [_stored(f) for f in (near, far)]
    assert stored == [pytest.approx(13.0), pytest.approx(20.0 - 10.0 * 0.7**10)]


def _stored(forecaster: Forecaster) -> float:
    """The average that the forecaster holds for its type, from the next state it stores."""
    forecaster.step(Stored(key="forecaster", revision=1), 0.0)
    effects = forecaster.step(report_of(0, model_id="other"), 0.0)
    (state,) = [e.message for e in effects if isinstance(e, Store)]
    assert isinstance(state, ForecasterState)
    return state.models[0].types[0].ewma_rps


def test_missing_windows_are_logged() -> None:
    """Nobody would see that the profiler was away."""
    forecaster = forecaster_of()
    forecaster.step(report_of(0, 1.0), 10.0)
    effects = forecaster.step(report_of(4, 1.0), 50.0)
    fields = {"model_id": "m", "windows": 3}
    assert Log("forecaster.windows_missing", fields, "warning") in effects


def test_repeated_and_overtaken_reports_are_ignored() -> None:
    """One window would count twice, or the past as the present."""
    forecaster = forecaster_of()
    forecaster.step(report_of(5, 1.0), 60.0)
    for window in (5, 4):
        assert not forecasts(forecaster.step(report_of(window, 9.0), 61.0))


def test_a_clock_set_back_does_not_silence_it() -> None:
    """After a clock correction there would be no forecast until the old time comes again."""
    forecaster = forecaster_of(errors_max=60)
    forecaster.step(report_of(10_000, 1.0), 10.0)
    (forecast,) = forecasts(forecaster.step(report_of(5, 2.0), 20.0))
    assert forecast.types[0].arrivals_rps == 2.0


def test_lengths_come_from_windows_with_requests() -> None:
    """An empty window would pull the expected lengths to its placeholder."""
    forecaster = forecaster_of(ewma_rate=0.5)
    forecaster.step(report_of(0, 1.0), 10.0)
    empty = DemandReport(
        model_id="m", window_start_s=10.0, window_s=10.0, types=(demand_of(0, 0.0, tokens=9e9),)
    )
    (forecast,) = forecasts(forecaster.step(empty, 20.0))
    assert forecast.types[0].input_tokens_mean == 100.0


def test_a_type_that_is_retired_leaves_the_forecast() -> None:
    """The scheduler would plan for a type that no longer exists."""
    forecaster = forecaster_of()
    forecaster.step(report_of(0, 1.0, 2.0), 10.0)
    (forecast,) = forecasts(forecaster.step(report_of(1, 1.0), 20.0))
    assert [t.request_type for t in forecast.types] == [0]


def test_history_survives_a_restart() -> None:
    """After each restart the worse predictor might speak for minutes."""
    first = forecaster_of()
    series = [10.0, 20.0] * 20
    state: ForecasterState | None = None
    for window, rps in enumerate(series):
        for effect in first.step(report_of(window, rps), 0.0):
            if isinstance(effect, Store) and isinstance(effect.message, ForecasterState):
                state = effect.message
                first.step(Stored(key="forecaster", revision=window + 1), 0.0)
    second = Forecaster(ForecasterConfig(), unix_offset_s=0.0)
    assert second.step(Started(), 0.0) == [Load("forecaster", ForecasterState)]
    second.step(Loaded(key="forecaster", message=state, revision=40), 0.0)
    (here,) = forecasts(first.step(report_of(40, 15.0), 0.0))
    (there,) = forecasts(second.step(report_of(40, 15.0), 0.0))
    assert there.types[0].method == here.types[0].method == "ewma"
    assert there.types[0].arrivals_rps == pytest.approx(here.types[0].arrivals_rps)


def test_the_newest_report_waits_for_the_state() -> None:
    """A slow read of the state would lose a window, or start the race anew."""
    forecaster = Forecaster(ForecasterConfig(), unix_offset_s=0.0)
    forecaster.step(Started(), 0.0)
    assert forecaster.step(report_of(0, 1.0), 0.0) == []
    assert forecaster.step(report_of(1, 2.0), 0.0) == []
    (forecast,) = forecasts(forecaster.step(Loaded(key="forecaster"), 0.0))
    assert forecast.types[0].arrivals_rps == 2.0


def test_models_and_types_are_bounded() -> None:
    """A broken profiler would fill the forecaster's memory."""
    forecaster = forecaster_of(models_max=2, types_max=3)
    for i in range(5):
        forecaster.step(report_of(0, *([1.0] * 9), model_id=f"m{i}"), 0.0)
        forecaster.check()


@pytest.mark.parametrize("window_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_window_is_refused(window_s: float) -> None:
    """One broken report would make every later forecast NaN."""
    report = DemandReport(model_id="m", window_start_s=0.0, window_s=window_s)
    assert [type(e) for e in forecaster_of().step(report, 0.0)] == [Log]


def test_conflict_stray_question_and_drain() -> None:
    """A second forecaster or a stray message would end this one."""
    forecaster = forecaster_of()
    assert [type(e) for e in forecaster.step(StoreConflict(key="forecaster"), 0.0)] == [Log, Load]
    assert [type(e) for e in forecaster.step(Query(report_of(0), "x"), 0.0)] == [Log]
    assert forecaster.step(Draining(), 0.0) == []


@pytest.mark.parametrize("setting", [{"ewma_rate": 1.5}, {"ewma_rate": 0.0}, {"errors_max": 0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    """Forecasts would oscillate or never move."""
    with pytest.raises(ConfigInvalid):
        ForecasterConfig(**setting).checked()
