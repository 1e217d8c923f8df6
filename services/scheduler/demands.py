"""What the scheduler knows of demand and load: the newest word of each model and each replica."""

from collections.abc import Collection
from math import isfinite

from services.scheduler.policies.interface import ModelDemand
from shared.messages.demand import DemandReport, ForecastReport, TypeForecast
from shared.messages.replicas import ReplicaReport

RATE_MIN, RATE_MAX = 1e-6, 1e6
"""Requests per second. Below, a type is not expected within the week; above is no forecast."""
TOKENS_MAX = 1e7
TYPES_MAX = 256


class Demands:
    """Bounded: one forecast and one window for each model of the topology, one report for each
    replica in force."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = tuple(models)
        self._forecasts: dict[str, ForecastReport] = {}
        self._windows: dict[str, DemandReport] = {}
        self._loads: dict[str, ReplicaReport] = {}
        self.heard = 0
        """Forecasts so far: tells whether one has come since."""

    def forecast(self, report: ForecastReport) -> None:
        if report.model_id in self._models:
            self._forecasts[report.model_id] = report
            self.heard += 1

    def window(self, report: DemandReport) -> None:
        if report.model_id in self._models:
            self._windows[report.model_id] = report

    def load(self, report: ReplicaReport, *, leaders: Collection[tuple[str, str]]) -> None:
        """``leaders``: replica and leading worker of each replica in force; others are no news."""
        if (report.replica_id, report.worker_id) in leaders:
            self._loads[report.replica_id] = report

    def keep_loads(self, leaders: Collection[tuple[str, str]]) -> None:
        """Forget the replicas that are in force no more."""
        self._loads = {
            id_: report
            for id_, report in self._loads.items()
            if (report.replica_id, report.worker_id) in leaders
        }

    @property
    def known(self) -> bool:
        """Whether anything is expected at all: until then there is nothing to plan for."""
        return any(demand.types for demand in self.models())

    def models(self) -> tuple[ModelDemand, ...]:
        """What each model is expected to get; nothing without a forecast."""
        return tuple(self._demand(model_id) for model_id in self._models)

    @property
    def windows(self) -> tuple[DemandReport, ...]:
        return tuple(self._windows[id_] for id_ in self._models if id_ in self._windows)

    @property
    def loads(self) -> tuple[ReplicaReport, ...]:
        return tuple(report for _, report in sorted(self._loads.items()))

    @property
    def expected_rps(self) -> float | None:
        """Arrivals that the newest forecasts expect; None while there is none."""
        if not self._forecasts:
            return None
        return round(sum(demand.arrivals_rps for demand in self.models()), 3)

    def _demand(self, model_id: str) -> ModelDemand:
        report = self._forecasts.get(model_id)
        if report is None:
            return ModelDemand(model_id=model_id, types=())
        types = tuple(kind for kind in report.types if _plausible(kind))[:TYPES_MAX]
        horizon_s = report.horizon_s if isfinite(report.horizon_s) else 0.0
        return ModelDemand(model_id=model_id, types=types, horizon_s=horizon_s)


def _plausible(kind: TypeForecast) -> bool:
    """Whether a policy may divide by it. Not a number compares as false."""
    return (
        RATE_MIN <= kind.arrivals_rps <= RATE_MAX
        and 0.0 < kind.input_tokens_mean <= TOKENS_MAX
        and 0.0 <= kind.output_tokens_mean <= TOKENS_MAX
    )
