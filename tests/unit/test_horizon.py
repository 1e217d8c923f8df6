"""For which demand plans are made: by hand for single rules, with numbers."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

import pytest

from services.scheduler.policies.capacity import build
from services.scheduler.policies.horizon import (
    BACKLOG_MAX,
    CAUTION,
    WORK_OFF_S,
    Z90,
    Foresight,
    lags,
    unlikely,
    variation,
)
from services.scheduler.policies.horizon_lasting import (
    LASTS_S,
    LASTS_S_MAX,
    LASTS_S_MIN,
    Lasting,
    apart,
    near,
)
from services.scheduler.policies.interface import ModelDemand, Problem
from shared.messages.demand import DemandReport, TypeDemand, TypeForecast
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import ReplicaReport
from tests.unit.joint_cases import MadeUpRates, offers, problem

M = "llama-2-70b"


def forecast(*types: TypeForecast, **changes: object) -> Problem:
    """A problem in which nothing but the forecast is known, unless told otherwise."""
    demand = ModelDemand(model_id=M, types=types, horizon_s=60.0)
    return replace(problem({M: []}, offers(8)), models=(demand,), **changes)


def kind(
    number: int,
    rps: float,
    *,
    mae: float | None = None,
    between: tuple[float, float] | None = None,
    output_tokens: float = 100.0,
) -> TypeForecast:
    low, high = between or (None, None)
    return TypeForecast(
        request_type=number,
        arrivals_rps=rps,
        input_tokens_mean=500.0,
        output_tokens_mean=output_tokens,
        error_rps_mae=mae,
        arrivals_rps_p10=low,
        arrivals_rps_p90=high,
    )


def window(rates: Mapping[int, float], *, seconds: float = 10.0) -> DemandReport:
    return DemandReport(
        model_id=M,
        window_start_s=0.0,
        window_s=seconds,
        types=tuple(
            TypeDemand(
                request_type=number,
                requests=round(rps * seconds),
                arrivals_rps=rps,
                input_tokens_mean=500.0,
                output_tokens_mean=100.0,
                input_tokens_centroid=500.0,
                output_tokens_centroid=100.0,
            )
            for number, rps in rates.items()
        ),
    )


def high_rps(case: Problem) -> dict[int, float]:
    (model,) = Foresight().foresee(case).high.models
    return {each.request_type: each.arrivals_rps for each in model.types}


def test_the_total_is_at_its_90th_percentile_and_not_all_types_at_theirs() -> None:
    """Two types, each 3 above its mean one time in ten: together 5.2 above, not 6."""
    case = forecast(kind(0, 10.0, between=(8.0, 13.0)), kind(1, 5.0, between=(4.0, 8.0)))
    total = sqrt(0.5 * (9 + 9) + 0.5 * 36)
    assert high_rps(case) == pytest.approx({0: 10.0 + total / 2, 1: 5.0 + total / 2})
    foreseen = Foresight().foresee(case)
    assert foreseen.lines[M, 0].rps == pytest.approx(10.0)
    assert (foreseen.lines[M, 0].low_rps, foreseen.lines[M, 0].high_rps) == (8.0, 13.0)


def test_one_type_alone_is_at_its_own_90th_percentile() -> None:
    """By its quantile, by its error so far, or by chance alone."""
    assert high_rps(forecast(kind(0, 10.0, between=(8.0, 13.0)))) == pytest.approx({0: 13.0})
    by_error = 10.0 + Z90 * CAUTION * 2.0
    assert high_rps(forecast(kind(0, 10.0, mae=2.0))) == pytest.approx({0: by_error})
    by_chance = 10.0 + Z90 * sqrt(10.0 / 60.0)
    assert high_rps(forecast(kind(0, 10.0))) == pytest.approx({0: by_chance})


def test_an_exact_forecast_has_no_spread() -> None:
    """An error of 0 is a word, not the lack of one."""
    assert high_rps(forecast(kind(0, 10.0, mae=0.0))) == pytest.approx({0: 10.0})


def test_no_plan_is_made_for_less_than_was_seen() -> None:
    """A forecast of half of what comes: the high demand has all of it, the usual one all but what
    chance may have added."""
    case = forecast(kind(0, 5.0, mae=0.0), observed=(window({0: 10.0}),))
    foreseen = Foresight().foresee(case)
    assert high_rps(case) == pytest.approx({0: 10.0})
    assert foreseen.lines[M, 0].rps == pytest.approx(10.0 - sqrt(10.0 / 10.0))
    assert any("beyond the forecast" in note for note in foreseen.notes)


def test_what_was_seen_less_often_than_expected_changes_nothing() -> None:
    """What is seen is a floor: a quiet window is no reason to let go."""
    case = forecast(kind(0, 10.0, mae=0.0), observed=(window({0: 5.0}),))
    assert high_rps(case) == pytest.approx({0: 10.0})


def test_a_type_that_nobody_expected_is_planned_for_when_seen() -> None:
    """What is lacking goes to the types that were seen more often than expected."""
    case = forecast(kind(0, 10.0, mae=0.0), observed=(window({0: 10.0, 3: 10.0}),))
    foreseen = Foresight().foresee(case)
    assert foreseen.lines[M, 0].rps == pytest.approx(10.0)
    assert foreseen.lines[M, 3].rps == pytest.approx(10.0 - sqrt(20.0 / 10.0))
    everything_new = forecast(observed=(window({1: 4.0}),))
    assert Foresight().foresee(everything_new).lines[M, 1].rps > 3.0


def test_what_waits_is_demand_to_be_worked_off() -> None:
    """Arrivals are counted when requests end: of an overload only the queue tells. What the
    target lets wait is no backlog, and what waits at most doubles the demand."""
    plan = DeploymentPlan(
        plan_id="p",
        replicas=(
            ReplicaSpec(replica_id="r", model_id=M, parallelism="tp1pp1", gpus=("h100-000",)),
        ),
    )

    def waits(requests: int) -> float:
        report = ReplicaReport(
            replica_id="r", worker_id="h100-000", incarnation="i", epoch=1, phase="serving",
            waiting=requests,
        )  # fmt: skip
        case = forecast(kind(0, 10.0, mae=0.0), in_force=plan, loads=(report,))
        return Foresight().foresee(case).lines[M, 0].rps

    assert waits(20) == pytest.approx(10.0)  # 10 requests/s may wait for 2 s each
    assert waits(620) == pytest.approx(10.0 + 600 / WORK_OFF_S)
    assert waits(100_000) == pytest.approx(10.0 * (1 + BACKLOG_MAX))


def test_a_smoothed_forecast_that_lags_behind_a_step_is_left_for_what_was_seen() -> None:
    """Or a new plan would be adopted periods after the mix has changed."""
    foresight = Foresight()
    before = forecast(kind(0, 9.0, mae=0.0), kind(1, 1.0, mae=0.0))
    foresight.foresee(replace(before, observed=(window({0: 9.0, 1: 1.0}),)))
    lagging = forecast(kind(0, 7.0, mae=0.0), kind(1, 3.0, mae=0.0))
    foreseen = foresight.foresee(replace(lagging, observed=(window({0: 1.0, 1: 9.0}),)))
    assert foreseen.shifted == {M}
    assert foreseen.lines[M, 0].rps == pytest.approx(1.0)
    assert foreseen.lines[M, 1].rps == pytest.approx(9.0)


def test_a_forecast_that_foresees_a_step_is_believed() -> None:
    """It moves away from what was seen last, where one that lags comes nearer."""
    foresight = Foresight()
    foresight.foresee(forecast(kind(0, 5.0, mae=0.0), kind(1, 5.0, mae=0.0)))
    coming = forecast(kind(0, 1.0, mae=0.0), kind(1, 9.0, mae=0.0))
    foreseen = foresight.foresee(replace(coming, observed=(window({0: 9.0, 1: 1.0}),)))
    assert not foreseen.shifted
    assert foreseen.lines[M, 1].rps == pytest.approx(9.0)


def test_chance_is_no_shift() -> None:
    """Few requests differ from any mix by much, many by little."""
    even = {0: 5.0, 1: 5.0}
    assert not unlikely({0: 7, 1: 3}, even)
    assert unlikely({0: 700, 1: 300}, even)
    assert not unlikely({0: 510, 1: 490}, even)
    few = window({0: 0.7, 1: 0.3})
    assert not lags(few, {0: 5.5, 1: 4.5}, even)
    small = window({0: 55.0, 1: 45.0}, seconds=1000.0)  # significant, and too little to matter
    assert not lags(small, {0: 5.2, 1: 4.8}, even)


def test_variation_is_half_the_sum_of_differences() -> None:
    """Of shares, not of rates."""
    assert variation({0: 1.0, 1: 3.0}, {0: 30.0, 1: 10.0}) == pytest.approx(0.5)
    assert variation({0: 1.0}, {0: 9.0}) == 0.0
    assert variation({}, {0: 1.0}) == 1.0


def test_the_usual_table_is_the_high_one_with_the_usual_rates() -> None:
    """Rates and columns stay, so that shares mean the same in both."""
    foreseen = Foresight().foresee(forecast(kind(0, 10.0, mae=4.0), kind(1, 2.0, mae=0.0)))
    high = build(foreseen.high, MadeUpRates())
    usual = foreseen.usual(high)
    assert usual.demand.tolist() == pytest.approx([10.0, 2.0])
    assert high.demand[0] > usual.demand[0]
    assert usual.columns == high.columns
    assert (usual.rates == high.rates).all()


def test_demands_are_apart_by_rates_and_by_lengths() -> None:
    """A mix whose answers became four times as long is another demand at the same rates."""
    one = Foresight().foresee(forecast(kind(0, 5.0), kind(1, 5.0))).lines
    more = Foresight().foresee(forecast(kind(0, 15.0), kind(1, 15.0))).lines
    longer = (
        Foresight()
        .foresee(forecast(kind(0, 5.0, output_tokens=400.0), kind(1, 5.0, output_tokens=400.0)))
        .lines
    )
    assert apart(one, one) == 0.0
    assert apart(one, more) == pytest.approx(0.5)
    assert apart(one, longer) == pytest.approx(0.6)
    assert near(one, one, horizon_s=60.0)
    assert not near(one, more, horizon_s=60.0)


def test_what_is_near_depends_on_how_much_was_seen() -> None:
    """Two windows of ten requests differ by chance as two of a thousand do not."""
    one = Foresight().foresee(forecast(kind(0, 1.0), kind(1, 1.0))).lines
    other = Foresight().foresee(forecast(kind(0, 1.5), kind(1, 0.5))).lines
    assert near(one, other, horizon_s=10.0)
    assert not near(one, other, horizon_s=10_000.0)


def test_a_plan_is_expected_to_last_as_long_as_demand_has_stayed() -> None:
    """First as told, longer the longer it goes on, an hour at most."""
    lasting, demand = Lasting(), Foresight().foresee(forecast(kind(0, 50.0))).lines
    assert lasting.now(demand, 0.0, horizon_s=60.0) == LASTS_S
    assert lasting.now(demand, 200.0, horizon_s=60.0) == LASTS_S
    assert lasting.now(demand, 1000.0, horizon_s=60.0) == 1000.0
    assert lasting.now(demand, 10_000.0, horizon_s=60.0) == LASTS_S_MAX


def test_demand_that_keeps_changing_is_not_expected_to_last() -> None:
    """Down to a minute; one step lowers it by less than half."""
    low = Foresight().foresee(forecast(kind(0, 20.0))).lines
    high = Foresight().foresee(forecast(kind(0, 60.0))).lines
    lasting = Lasting()
    lasting.now(low, 0.0, horizon_s=60.0)
    once = lasting.now(high, 30.0, horizon_s=60.0)
    assert LASTS_S / 2 < once < LASTS_S
    last = once
    for period in range(2, 40):
        last = lasting.now(low if period % 2 == 0 else high, 30.0 * period, horizon_s=60.0)
    assert last == pytest.approx(LASTS_S_MIN, rel=0.01)
