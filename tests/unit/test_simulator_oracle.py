"""The forecaster that knows the trace."""

import pytest

from loadgen.simulator.oracle import Oracle
from loadgen.simulator.source import Arrival
from loadgen.workload.records import TraceRecord
from shared.core import Publish, Started
from shared.messages.demand import DemandReport, ForecastReport, TypeDemand


def arrival(at_s: float, lengths: tuple[int, int], model_id: str = "m") -> Arrival:
    record = TraceRecord(timestamp_s=at_s, input_tokens=lengths[0], output_tokens=lengths[1])
    return Arrival(at_s, model_id, record)


def kind(number: int, input_tokens: float, output_tokens: float) -> TypeDemand:
    return TypeDemand(
        request_type=number,
        requests=70,
        arrivals_rps=7.0,
        input_tokens_mean=input_tokens,
        output_tokens_mean=output_tokens,
        input_tokens_centroid=input_tokens,
        output_tokens_centroid=output_tokens,
    )


def report(*types: TypeDemand, model_id: str = "m") -> DemandReport:
    return DemandReport(model_id=model_id, window_start_s=0.0, window_s=10.0, types=types)


def asked(oracle: Oracle, question: DemandReport, now_s: float) -> ForecastReport:
    (effect,) = oracle.step(question, now_s)
    assert isinstance(effect, Publish)
    assert isinstance(effect.message, ForecastReport)
    return effect.message


ARRIVALS = [
    arrival(5.0, (100, 10)),
    arrival(12.0, (100, 10)),
    arrival(20.0, (3000, 20)),
    arrival(21.0, (120, 14)),
    arrival(25.0, (9, 9), "other"),
    arrival(32.0, (100, 10)),
]


def test_it_counts_what_will_come_by_type() -> None:
    """Arrivals of the past, of another model or beyond the horizon would be foreseen, or of the
    wrong type."""
    oracle = Oracle(ARRIVALS, horizon_windows=2, unix_offset_s=1000.0)
    forecast = asked(oracle, report(kind(0, 110, 12), kind(4, 2500, 30)), 12.0)
    assert (forecast.model_id, forecast.made_at_s, forecast.horizon_s) == ("m", 1012.0, 20.0)
    short, long = forecast.types
    assert (short.request_type, long.request_type) == (0, 4)
    assert short.arrivals_rps * 20.0 == pytest.approx(2.0)
    assert long.arrivals_rps * 20.0 == pytest.approx(1.0)
    assert (short.input_tokens_mean, short.output_tokens_mean) == (110.0, 12.0)
    assert (long.input_tokens_mean, long.output_tokens_mean) == (3000.0, 20.0)
    assert (long.method, long.error_rps_mae) == ("oracle", 0.0)


def test_a_type_that_will_not_come_keeps_its_lengths() -> None:
    """A policy would divide by lengths of zero."""
    oracle = Oracle(ARRIVALS, horizon_windows=1, unix_offset_s=0.0)
    (none,) = asked(oracle, report(kind(0, 110, 12)), 100.0).types
    assert (none.arrivals_rps, none.input_tokens_mean, none.output_tokens_mean) == (0, 110, 12)


def test_who_knows_nothing_says_nothing() -> None:
    """A model without arrivals, or without types so far, would end the run."""
    oracle = Oracle(ARRIVALS, horizon_windows=1, unix_offset_s=0.0)
    assert oracle.step(Started(), 0.0) == []
    assert asked(oracle, report(), 0.0).types == ()
    assert asked(oracle, report(kind(0, 1, 1), model_id="unheard"), 0.0).types == ()
