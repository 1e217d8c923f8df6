"""For which demand plans are made: quantiles of the forecast, and never less than what is seen.

A forecast has each type's mean d[j] over its horizon, and mostly the range it should fall into four
times in five. Plans are made for two demands:

    usual  d[j]
    high   the 90th percentile of each model's total. With u[j] = p90[j] - d[j], and types of one
           model that move together by half (correlation C), the total spreads by
               U = sqrt((1 - C) sum_j u[j]^2 + C (sum_j u[j])^2) <= sum_j u[j]
           as sums of normal variables do, and high[j] = d[j] + u[j] U / sum_j u[j]: all 90th
           percentiles at once would be a rarer day than one in ten

Without quantiles u[j] is 1.28 standard deviations: from the mean absolute error so far (times 1.25,
were it normal), else from chance alone, sqrt(d[j] / horizon) for Poisson arrivals.

Forecasts can be wrong, so what the newest window saw corrects them upwards. Its N arrivals are as
uncertain as sqrt(N): ``usual`` is at least N - sqrt(N) and ``high`` at least N per window, what is
lacking being added to types that were seen more often than expected. Arrivals are counted when
requests end, so an overload hides itself; requests that wait at replicas for longer than their
target allows are demand too, to be worked off within ``WORK_OFF_S``.

Smoothed forecasts lag behind a step of the mix. What was seen replaces them at once if

- the window's counts do not fit the forecast of the decision before: chi-square beyond 1 in 1,000
  and total variation beyond ``SHIFT_MIN``; and
- the forecast of now is nearer to what was seen than that one was. One that foresees a change moves
  away from what was seen, and is believed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, sqrt

import msgspec

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.capacity_types import TypeDemand
from services.scheduler.policies.interface import ModelDemand, Problem
from services.scheduler.policies.weights import ANY_TYPE
from shared.messages.demand import DemandReport, TypeForecast

CORRELATION = 0.5
Z90 = 1.2816  # of a normal distribution
CAUTION = 1.25  # times a mean absolute error: one standard deviation, were it normal
SHIFT_MIN = 0.15  # total variation of two mixes: less would hardly change a plan
Z_SHIFT = 3.09  # one in 1,000
EXPECTED_MIN = 0.5  # requests: types that nobody expected are not infinitely unlikely
HORIZON_S = 30.0  # of a forecast that names none
WORK_OFF_S = 120.0  # about what a switch takes: no plan could be there sooner
BACKLOG_MAX = 1.0  # times the demand: what waits may double it and no more

Mix = Mapping[int, float]
"""Requests/s by type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One type. ``kind`` has its usual rate, ``waiting_rps`` of it to work off what waits;
    ``low_rps`` and ``high_rps`` are its own 10th and 90th percentile, ``total_rps`` its part of its
    model's 90th."""

    kind: TypeForecast
    low_rps: float
    high_rps: float
    total_rps: float
    waiting_rps: float = 0.0

    @property
    def rps(self) -> float:
        return self.kind.arrivals_rps


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """``high``: the problem under its high demand; ``lines``: its types, by model and number;
    ``shifted``: models whose forecast was left for what was seen; ``notes``: what the forecast was
    corrected by, in words."""

    high: Problem
    lines: Mapping[tuple[str, int], Line]
    shifted: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def usual(self, table: Table) -> Table:
        """``table``, made for the high demand, under the usual one."""
        lines = [self.line(kind) for kind in table.types]
        types = tuple(
            replace(kind, arrivals_rps=line.rps) if line else kind
            for kind, line in zip(table.types, lines, strict=True)
        )
        return replace(table, types=types)

    def between(self, kind: TypeDemand) -> tuple[float, float]:
        """10th and 90th percentile of a type's arrivals."""
        line = self.line(kind)
        return (line.low_rps, line.high_rps) if line else (kind.arrivals_rps, kind.arrivals_rps)

    def line(self, kind: TypeDemand) -> Line | None:
        """None for the nominal type of a model of which nothing is expected."""
        return None if kind.name == ANY_TYPE else self.lines[kind.model_id, int(kind.name)]


class Foresight:
    """Remembers the last forecast of each model, to tell one that lags from one that foresees."""

    def __init__(self) -> None:
        self._before: dict[str, Mix] = {}

    def foresee(self, problem: Problem) -> Foreseen:
        windows = {report.model_id: report for report in problem.observed}
        waiting = _waiting(problem)
        high: list[ModelDemand] = []
        lines: dict[tuple[str, int], Line] = {}
        shifted: set[str] = set()
        notes: list[str] = []
        for demand in problem.models:
            model_id, window = demand.model_id, windows.get(demand.model_id)
            forecast = {kind.request_type: kind.arrivals_rps for kind in demand.types}
            if window is not None and lags(window, forecast, self._before.get(model_id)):
                demand = replace(demand, types=seen_types(window), horizon_s=window.window_s)  # noqa: PLW2901  # the same model's
                shifted.add(model_id)
                notes.append(f"the mix of {model_id} has shifted, planned for as seen last")
            self._before[model_id] = forecast
            own, lacking_rps = _lines(demand, window)
            if lacking_rps > 0.0:
                notes.append(f"{lacking_rps:.3g} requests/s of {model_id} beyond the forecast")
            own, queue = _with_backlog(own, waiting[model_id], problem.targets[model_id].ttft_s)
            if queue > 0.0:
                notes.append(f"{queue:.0f} requests of {model_id} wait to be worked off")
            lines |= {(model_id, line.kind.request_type): line for line in own}
            types = tuple(
                msgspec.structs.replace(line.kind, arrivals_rps=line.total_rps) for line in own
            )
            high.append(replace(demand, types=types))
        return Foreseen(
            high=replace(problem, models=tuple(high)),
            lines=lines,
            shifted=frozenset(shifted),
            notes=tuple(notes),
        )


def seen_types(window: DemandReport) -> tuple[TypeForecast, ...]:
    """What a window saw, as a forecast that everything goes on so."""
    return tuple(
        TypeForecast(
            request_type=kind.request_type,
            arrivals_rps=kind.arrivals_rps,
            input_tokens_mean=kind.input_tokens_mean,
            output_tokens_mean=max(0.0, kind.output_tokens_mean),
            method="seen",
            class_shares=kind.class_shares,
        )
        for kind in window.types
        if isfinite(kind.arrivals_rps + kind.output_tokens_mean)
        and kind.arrivals_rps > 0.0
        and 0.0 < kind.input_tokens_mean < float("inf")
    )


def lags(window: DemandReport, now: Mix, before: Mix | None) -> bool:
    """Whether the forecast ``now`` lags behind a step of the mix that the window shows."""
    counts = {kind.request_type: kind.arrivals_rps * window.window_s for kind in window.types}
    if not before or not sum(counts.values()):
        return False
    was, is_ = variation(counts, before), variation(counts, now)
    return was > SHIFT_MIN and unlikely(counts, before) and 0.0 < is_ < was


def variation(one: Mix, other: Mix) -> float:
    """Total variation distance of two mixes, 0 to 1; 1 when either is empty."""
    first, second = sum(one.values()), sum(other.values())
    if first <= 0.0 or second <= 0.0:
        return 1.0
    keys = one.keys() | other.keys()
    return 0.5 * sum(abs(one.get(k, 0.0) / first - other.get(k, 0.0) / second) for k in keys)


def unlikely(counts: Mix, mix: Mix) -> bool:
    """Whether Pearson's chi-square of ``counts`` against ``mix`` is beyond 1 in 1,000, by Wilson's
    and Hilferty's approximation of its quantile."""
    number, total = sum(counts.values()), sum(mix.values())
    keys = counts.keys() | mix.keys()
    freedom = len(keys) - 1
    if freedom < 1 or number <= 0.0 or total <= 0.0:
        return False
    squares = 0.0
    for key in keys:
        expected = max(EXPECTED_MIN, number * mix.get(key, 0.0) / total)
        squares += (counts.get(key, 0.0) - expected) ** 2 / expected
    part = 2.0 / (9.0 * freedom)
    return squares > freedom * (1.0 - part + Z_SHIFT * sqrt(part)) ** 3


def _lines(demand: ModelDemand, window: DemandReport | None) -> tuple[list[Line], float]:
    """The types of one model, at least as many requests/s as were seen, and what its forecast
    lacked of that at its usual demand."""
    horizon_s = demand.horizon_s or HORIZON_S
    kinds = {kind.request_type: kind for kind in demand.types}
    spreads = {key: _spread(kind, horizon_s) for key, kind in kinds.items()}
    seen = {kind.request_type: kind for kind in (seen_types(window) if window else ())}
    for key, kind in seen.items():
        if key not in kinds:
            kinds[key] = msgspec.structs.replace(kind, arrivals_rps=0.0)
            spreads[key] = (0.0, 0.0)
    if not kinds:
        return [], 0.0
    above = [spread[1] for spread in spreads.values()]
    widths = sum(above)
    total = sqrt((1.0 - CORRELATION) * sum(u * u for u in above) + CORRELATION * widths**2)
    part = total / widths if widths > 0.0 else 0.0
    usual = {key: kind.arrivals_rps for key, kind in kinds.items()}
    high = {key: usual[key] + part * spreads[key][1] for key in kinds}
    seen_rps = {key: kind.arrivals_rps for key, kind in seen.items()}
    arrived = sum(seen_rps.values())
    noise = sqrt(arrived / window.window_s) if window is not None and window.window_s > 0 else 0.0
    raised, lacking = _raised(usual, seen_rps, arrived - noise)
    high, _ = _raised({key: max(high[key], raised[key]) for key in kinds}, seen_rps, arrived)
    return [
        Line(
            kind=msgspec.structs.replace(kind, arrivals_rps=raised[key]),
            low_rps=max(0.0, usual[key] - spreads[key][0]),
            high_rps=max(raised[key], usual[key] + spreads[key][1]),
            total_rps=high[key],
        )
        for key, kind in sorted(kinds.items())
        if high[key] > 0.0 and raised[key] > 0.0
    ], lacking


def _spread(kind: TypeForecast, horizon_s: float) -> tuple[float, float]:
    """How far the 10th percentile is below the mean, and the 90th above."""
    if kind.arrivals_rps_p10 is not None and kind.arrivals_rps_p90 is not None:
        return (
            max(0.0, kind.arrivals_rps - kind.arrivals_rps_p10),
            max(0.0, kind.arrivals_rps_p90 - kind.arrivals_rps),
        )
    if kind.error_rps_mae is not None:
        wide = Z90 * CAUTION * max(0.0, kind.error_rps_mae)
    else:
        wide = Z90 * sqrt(kind.arrivals_rps / horizon_s)
    return min(wide, kind.arrivals_rps), wide


def _raised(rates: Mix, seen: Mix, least: float) -> tuple[dict[int, float], float]:
    """``rates`` with a sum of ``least`` or more, and what was added: to types that were seen more
    often than they have."""
    lacking = least - sum(rates.values())
    over = {key: max(0.0, seen.get(key, 0.0) - rate) for key, rate in rates.items()}
    total = sum(over.values())
    if lacking <= 0.0 or total <= 0.0:
        return dict(rates), 0.0
    return {key: rate + lacking * over[key] / total for key, rate in rates.items()}, lacking


def _waiting(problem: Problem) -> Counter[str]:
    """Requests that wait at the replicas in force, by model."""
    model_of = {spec.replica_id: spec.model_id for spec in problem.in_force.replicas}
    waiting: Counter[str] = Counter()
    for report in problem.loads:
        waiting[model_of.get(report.replica_id, "")] += max(0, report.waiting)
    return waiting


def _with_backlog(lines: list[Line], waiting: int, target_s: float) -> tuple[list[Line], float]:
    """``lines`` with what waits for longer than its target added in proportion, and how many
    requests that are."""
    arrivals = sum(line.rps for line in lines)
    queue = waiting - arrivals * target_s
    if queue <= 0.0 or arrivals <= 0.0:
        return lines, 0.0
    more = min(BACKLOG_MAX, queue / WORK_OFF_S / arrivals)
    return [
        replace(
            line,
            kind=msgspec.structs.replace(line.kind, arrivals_rps=line.rps * (1.0 + more)),
            total_rps=line.total_rps + line.rps * more,
            waiting_rps=line.rps * more,
        )
        for line in lines
    ], queue
