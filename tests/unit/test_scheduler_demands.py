"""What the scheduler believes of demand, when words of it are late, repeated, lost or absurd."""

import pytest

from services.ingress.completed import completed
from services.ingress.journey import Journey
from services.profiler.config import ProfilerConfig
from services.profiler.core import Profiler, WindowDeadline
from services.scheduler.demands import NOMINAL, WANTED_S, Demands
from services.scheduler.past import FLOOR, FLOOR_WINDOWS_MIN
from shared.core import Effect, Loaded, Publish, Started
from shared.messages.demand import (
    DemandReport,
    ForecastReport,
    TypeArrivals,
    TypeDemand,
    TypeForecast,
)
from shared.messages.requests import FinishReason, RequestsCompleted, SamplingParams


def forecast(rps: float, *, made_at_s: float, horizon_s: float = 30.0) -> ForecastReport:
    kind = TypeForecast(
        request_type=0, arrivals_rps=rps, input_tokens_mean=9.0, output_tokens_mean=9.0
    )
    return ForecastReport(model_id="m", made_at_s=made_at_s, horizon_s=horizon_s, types=(kind,))


def window(rps: float, *, start_s: float) -> DemandReport:
    kind = TypeDemand(
        request_type=0, requests=1, arrivals_rps=rps, input_tokens_mean=9.0, output_tokens_mean=9.0,
        input_tokens_centroid=9.0, output_tokens_centroid=9.0, class_shares={"batch": 1.0},
    )  # fmt: skip
    return DemandReport(model_id="m", window_start_s=start_s, window_s=10.0, types=(kind,))


def test_a_late_or_repeated_forecast_is_no_news() -> None:
    """Otherwise the network would bring demand back that has passed, and decisions forward."""
    demands = Demands(("m",))
    newest = forecast(2.0, made_at_s=20.0)
    demands.forecast(newest, 20.0)
    demands.forecast(forecast(1.0, made_at_s=10.0), 21.0)
    demands.forecast(newest, 80.0)
    assert demands.expected_rps(81.0) == 2.0
    assert demands.heard == 1
    assert demands.sources(111.0) == {"m": "stale"}, "a repeated word is as old as the first"
    demands.forecast(forecast(3.0, made_at_s=-1e6), 82.0)
    assert demands.expected_rps(83.0) == 3.0, "the forecaster's clock was set back"


def test_a_late_window_is_no_news() -> None:
    """Otherwise the fall-back would be on the past."""
    demands = Demands(("m",))
    for rps, start_s in ((2.0, 20.0), (1.0, 10.0), (2.0, 20.0)):
        demands.window(window(rps, start_s=start_s), 30.0)
    assert [w.window_start_s for w in demands.windows] == [20.0]


def test_observed_demand_counts_when_forecasts_have_ceased_or_never_come() -> None:
    """Otherwise a forecaster that is down would freeze the plan, or a new mesh at its start."""
    demands = Demands(("m",))
    demands.window(window(1.0, start_s=0.0), 10.0)
    assert demands.sources(10.0) == {"m": "none"}, "the first forecast is on its way"
    demands.window(window(2.0, start_s=10.0), 20.0)
    (demand,) = demands.models(20.0)
    assert [(k.arrivals_rps, k.method, k.class_shares) for k in demand.types] == [
        (2.0, "observed", {"batch": 1.0})
    ]
    demands.forecast(forecast(5.0, made_at_s=21.0), 21.0)
    assert demands.expected_rps(111.0) == 5.0
    demands.window(window(3.0, start_s=100.0), 111.5)
    assert demands.expected_rps(112.0) == 3.0
    assert not demands.blind(112.0)
    assert demands.blind(142.0)
    assert demands.expected_rps(142.0) == 3.0, "the newest word there was"
    assert not Demands(("m",)).blind(142.0), "nothing was ever known: that is the start"


def test_a_forecast_far_below_what_just_arrived_is_not_believed_by_who_asks_for_that() -> None:
    """Otherwise an overload, in which few requests end, would look like a fall of demand."""
    for floored, expected in ((True, FLOOR * 6.0), (False, 0.5)):
        demands = Demands(("m",), floored=floored)
        for number in range(FLOOR_WINDOWS_MIN):
            demands.window(
                DemandReport(
                    model_id="m", window_start_s=10.0 * number + 60.0, window_s=10.0,
                    settled_start_s=10.0 * number, settled_s=10.0,
                    settled=(TypeArrivals(request_type=0, arrivals_rps=6.0),),
                ),
                10.0 * number + 70.0,
            )  # fmt: skip
        demands.forecast(forecast(0.5, made_at_s=130.0), 130.0)
        assert demands.expected_rps(131.0) == pytest.approx(expected)
        demands.forecast(forecast(9.0, made_at_s=140.0), 140.0)
        assert demands.expected_rps(141.0) == 9.0, "from below only"


def test_what_is_expected_is_watched_from_its_first_word_on() -> None:
    """Otherwise a mesh would be planned for the few requests that ended within its first seconds,
    or watch anew whenever demand pauses."""
    demands = Demands(("m",))
    assert not demands.watched(0.0, for_s=0.0), "nothing is expected"
    demands.forecast(forecast(1.0, made_at_s=5.0), 5.0)
    assert not demands.watched(5.0, for_s=60.0)
    assert demands.watched(5.0, for_s=0.0)
    demands.forecast(forecast(9.0, made_at_s=50.0), 50.0)
    assert not demands.watched(64.9, for_s=60.0)
    assert demands.watched(65.0, for_s=60.0)
    nothing = ForecastReport(model_id="m", made_at_s=70.0, horizon_s=30.0)
    demands.forecast(nothing, 70.0)
    assert not demands.watched(75.0, for_s=60.0)
    demands.forecast(forecast(1.0, made_at_s=80.0), 80.0)
    assert demands.watched(80.0, for_s=60.0), "known for long"
    assert demands.watched(1e4, for_s=60.0), "a stale forecast is what is known"


@pytest.mark.parametrize("horizon_s", [float("nan"), float("inf"), -1.0, 0.0, 1e12])
def test_no_horizon_makes_a_forecast_last_for_ever_or_not_at_all(horizon_s: float) -> None:
    """Otherwise one absurd number would blind the scheduler, or make it believe the past."""
    demands = Demands(("m",))
    demands.forecast(forecast(1.0, made_at_s=0.0, horizon_s=horizon_s), 0.0)
    assert demands.sources(20.0) == {"m": "forecast"}
    assert demands.models(20.0)[0].horizon_s in (0.0, 1e12), "a length of time, or none"
    assert demands.sources(1e5) == {"m": "stale"}


def test_what_is_said_in_the_log_is_said_once() -> None:
    """Otherwise the log would repeat each second what an operator read at the first."""
    demands = Demands(("m",), stale_s=5.0)
    demands.forecast(forecast(1.0, made_at_s=0.0), 0.0)
    events = [log.event for now_s in range(20) for log in demands.news(float(now_s))]
    assert events == ["forecast.stale"]
    demands.forecast(forecast(1.0, made_at_s=20.0), 20.0)
    assert [log.event for log in demands.news(20.0)] == ["forecast.fresh"]


@pytest.mark.parametrize("finish", ["failed", "abort"])
def test_a_model_that_nothing_serves_is_wanted_by_those_it_turned_away(
    finish: FinishReason,
) -> None:
    """Otherwise a model scaled to zero would stay there, whoever asks for it: from the ingress's
    record over the profiler's window to the scheduler, the chain must hold."""
    journey = Journey(
        request_id="q", model_id="idle", prompt_tokens=[1, 2, 3], slo_class="standard", tenant="",
        sampling=SamplingParams(output_tokens_max=9), arrived_s=0.0, deadline_s=600.0,
        phase="ended", finish=finish,
    )  # fmt: skip
    record = completed(journey, 15.0)
    assert record.outcome == ("rejected" if finish == "failed" else "aborted")
    profiler = Profiler(ProfilerConfig(), models=("m", "idle"), unix_offset_s=0.0)
    effects: list[Effect] = []
    for event, now_s in (
        (Started(), 10.0),
        (Loaded(key="profiler"), 10.0),
        (RequestsCompleted(ingress_id="i", completed=(record,)), 15.0),
        (WindowDeadline(), 20.0),
    ):
        effects += profiler.step(event, now_s)
    demands = Demands(("m", "idle"))
    for effect in effects:
        if isinstance(effect, Publish) and isinstance(effect.message, DemandReport):
            demands.window(effect.message, 20.0)
    assert demands.wanted(20.0) == {"idle"}
    (kind,) = demands.models(20.0)[1].types
    assert (kind.method, kind.arrivals_rps) == (NOMINAL, 0.1)
    assert demands.wanted(20.0 + WANTED_S + 1.0) == frozenset()
    demands = Demands(("m", "idle"))
    for effect in effects:
        if isinstance(effect, Publish) and isinstance(effect.message, DemandReport):
            demands.window(effect.message, 20.0, served=("idle",))
    assert demands.expected_rps(20.0) is None, "it has a replica already"


def test_a_request_that_a_replica_had_taken_was_not_turned_away() -> None:
    """Otherwise a broken engine would count as a model without replicas."""
    journey = Journey(
        request_id="q", model_id="m", prompt_tokens=[1], slo_class="standard", tenant="",
        sampling=SamplingParams(output_tokens_max=9), arrived_s=0.0, deadline_s=600.0,
        phase="ended", finish="failed",
        replica_id="r0",
    )  # fmt: skip
    assert completed(journey, 15.0).outcome == "failed"
