"""What holds of the forecaster for any demand."""

from math import isfinite

from hypothesis import given, settings
from hypothesis import strategies as st

from services.forecaster.config import ForecasterConfig
from services.forecaster.core import Forecaster
from services.forecaster.predictors import Track
from shared.core import Loaded, Publish, Started, Stored
from shared.messages.demand import DemandReport, ForecastReport, TypeDemand

RATES = st.floats(0, 1e9) | st.sampled_from([-1.0, float("nan"), float("inf"), 0.0])


@st.composite
def reports(draw: st.DrawFn) -> DemandReport:
    types = tuple(
        TypeDemand(
            request_type=draw(st.integers(0, 3)),
            requests=draw(st.integers(0, 100)),
            arrivals_rps=draw(RATES),
            input_tokens_mean=draw(RATES),
            output_tokens_mean=draw(RATES),
            input_tokens_centroid=1.0,
            output_tokens_centroid=1.0,
        )
        for _ in range(draw(st.integers(0, 4)))
    )
    return DemandReport(
        model_id=draw(st.sampled_from(["m", "n", "o"])),
        window_start_s=draw(st.integers(0, 80)) * 10.0,
        window_s=10.0,
        types=types,
    )


@settings(max_examples=150)
@given(horizon=st.integers(1, 4), rate=st.floats(0.01, 1), history=st.lists(reports(), max_size=40))
def test_never_negative_nor_nan_and_bounded(
    horizon: int, rate: float, history: list[DemandReport]
) -> None:
    """The scheduler would be asked to plan for a demand that cannot be."""
    config = ForecasterConfig(
        horizon_windows=horizon, ewma_rate=rate, errors_max=5, models_max=2, types_max=3
    )
    forecaster = Forecaster(config, unix_offset_s=0.0)
    forecaster.step(Started(), 0.0)
    forecaster.step(Loaded(key="forecaster"), 0.0)
    for revision, report in enumerate(history):
        effects = forecaster.step(report, 0.0)
        forecaster.step(Stored(key="forecaster", revision=revision), 0.0)
        forecaster.check()
        for effect in effects:
            if isinstance(effect, Publish):
                assert isinstance(effect.message, ForecastReport)
                for forecast in effect.message.types:
                    values = (
                        forecast.arrivals_rps,
                        forecast.input_tokens_mean,
                        forecast.output_tokens_mean,
                        forecast.error_rps_mae or 0.0,
                    )
                    assert all(isfinite(value) and value >= 0.0 for value in values), forecast


@given(rps=st.floats(0, 1e6), windows=st.integers(5, 30))
def test_constant_demand_is_forecast_exactly(rps: float, windows: int) -> None:
    """The scheduler would see changes where there are none."""
    demand = TypeDemand(
        request_type=0,
        requests=1,
        arrivals_rps=rps,
        input_tokens_mean=10.0,
        output_tokens_mean=10.0,
        input_tokens_centroid=10.0,
        output_tokens_centroid=10.0,
    )
    track = Track(ForecasterConfig(), demand)
    for _ in range(windows):
        track.observe(demand, missing=0)
    forecast = track.forecast(horizon_s=30.0)
    assert forecast.arrivals_rps == rps
    assert forecast.error_rps_mae is not None
    assert forecast.error_rps_mae <= 1e-9 * max(1.0, rps)
