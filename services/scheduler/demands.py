"""What the scheduler knows of demand and load: the newest word of each model and each replica.

A forecast counts until it is stale. Then what was last observed counts in its place, if that is
fresh; else the stale forecast stays what is known, and the core keeps to its plan. Messages may be
late, repeated or lost: what was made before what is known is no news, unless by so much that a
clock must have been set back.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import msgspec

from services.scheduler.past import Past
from services.scheduler.policies.interface import ModelDemand, PastWindow
from shared.core import Log
from shared.messages.demand import DemandReport, ForecastReport, TypeForecast
from shared.messages.replicas import ReplicaReport

RATE_MIN, RATE_MAX = 1e-6, 1e6
"""Requests per second. Below, a type is not expected within the week; above is no forecast."""
TOKENS_MIN, TOKENS_MAX = 0.5, 1e7  # of a prompt, which has one at least
TYPES_MAX = 256
STALE_HORIZONS = 3.0
HORIZON_S_MIN, HORIZON_S_MAX = 10.0, 3600.0  # what staleness goes by, whatever a forecast claims
WINDOWS_ALONE = 2  # observed without a forecast ever: the forecaster is away
WANTED_S = 300.0
"""How long a model is planned for of which only requests are known that nobody served: a replica
takes minutes to come, and whoever was turned away, or gave up, tries again."""
WANTED_RPS_MIN, WANTED_INPUT_TOKENS, WANTED_OUTPUT_TOKENS = 0.1, 512.0, 256.0
"""What is expected of a model of which nothing is known but that it is wanted."""
NOMINAL = "nominal"
"""The method of a forecast that nobody made."""

Source = Literal["none", "forecast", "observed", "stale"]


@dataclass(frozen=True, slots=True)
class _Heard:
    forecast: ForecastReport
    at_s: float


@dataclass(slots=True)
class _Windows:
    """The newest window of a model, and how many came without a forecast."""

    newest: DemandReport
    at_s: float
    alone: int = 1
    unserved: int = 0  # requests that ended otherwise than completed, of a model without types
    unserved_s: float = float("-inf")


class Demands:
    """Bounded: one forecast and one window for each model of the topology, one report for each
    replica in force."""

    def __init__(
        self, models: Collection[str], *, stale_s: float = 0.0, floored: bool = False
    ) -> None:
        """``stale_s``: after which a forecast counts no more; 0: three of its horizons.
        ``floored``: whether what arrived in the last minutes bounds forecasts from below."""
        self._floored = floored
        self._models, self._stale_s = tuple(models), stale_s
        self._forecasts: dict[str, _Heard] = {}
        self._windows: dict[str, _Windows] = {}
        self._loads: dict[str, ReplicaReport] = {}
        self._told: dict[str, Source] = {}
        self._past = Past(models)
        self._known_s: float | None = None  # since when anything is expected
        self.heard = 0
        """Forecasts so far: tells whether one has come since."""

    def forecast(self, report: ForecastReport, now_s: float) -> None:
        known = self._forecasts.get(report.model_id)
        if report.model_id not in self._models or (known and known.forecast == report):
            return
        if known and 0.0 < known.forecast.made_at_s - report.made_at_s < self._limit_s(report):
            return
        self._forecasts[report.model_id] = _Heard(report, now_s)
        self.heard += 1

    def window(self, report: DemandReport, now_s: float, *, served: Collection[str] = ()) -> None:
        """``served``: models with replicas in force, whose requests are lost for other reasons."""
        self._past.window(report)
        known = self._windows.get(report.model_id)
        if report.model_id not in self._models or (known and known.newest == report):
            return
        if known is None:
            known = self._windows[report.model_id] = _Windows(report, now_s, alone=0)
        elif 0.0 < known.newest.window_start_s - report.window_start_s < HORIZON_S_MAX:
            return
        known.newest, known.at_s = report, now_s
        known.alone += 1
        unserved = report.rejected + report.aborted + report.failed
        if unserved > 0 and not report.types and report.model_id not in served:
            known.unserved, known.unserved_s = unserved, now_s

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

    def watched(self, now_s: float, *, for_s: float) -> bool:
        """Whether what is expected was first known ``for_s`` ago. The first windows hold what ended
        within seconds: a plan for that is soon regretted, and costs a switch each way."""
        if not any(demand.types for demand in self.models(now_s)):
            return False
        if self._known_s is None:
            self._known_s = now_s
        return now_s - self._known_s >= for_s

    def models(self, now_s: float) -> tuple[ModelDemand, ...]:
        """What each model is expected to get; nothing without any word of it."""
        return tuple(self._demand(model_id, now_s) for model_id in self._models)

    def sources(self, now_s: float) -> Mapping[str, Source]:
        """By what each model is planned for."""
        return {model_id: self._source(model_id, now_s) for model_id in self._models}

    def news(self, now_s: float) -> Iterable[Log]:
        """A word for the log when forecasts of a model have ceased, and when they are back."""
        for model_id, source in self.sources(now_s).items():
            before = self._told.get(model_id, "none")
            self._told[model_id] = source
            if source == before:
                continue
            if source in ("observed", "stale"):
                instead = "what was last observed" if source == "observed" else "the plan as it is"
                fields = {"model_id": model_id, "age_s": self._age_s(model_id, now_s)}
                yield Log("forecast.stale", {**fields, "goes_by": instead}, "warning")
            elif before in ("observed", "stale"):
                yield Log("forecast.fresh", {"model_id": model_id})

    def blind(self, now_s: float) -> bool:
        """Whether all that was ever known is out of date."""
        sources = set(self.sources(now_s).values())
        return "stale" in sources and sources <= {"stale", "none"}

    def wanted(self, now_s: float) -> frozenset[str]:
        """Models of which requests were turned away, or given up, and nothing else is known."""
        return frozenset(
            demand.model_id for demand in self.models(now_s) if _is_nominal(demand.types)
        )

    @property
    def history(self) -> Mapping[str, tuple[PastWindow, ...]]:
        """By model, the settled windows of the last minutes, the oldest first."""
        return self._past.windows

    @property
    def windows(self) -> tuple[DemandReport, ...]:
        return tuple(self._windows[id_].newest for id_ in self._models if id_ in self._windows)

    @property
    def loads(self) -> tuple[ReplicaReport, ...]:
        return tuple(report for _, report in sorted(self._loads.items()))

    def expected_rps(self, now_s: float) -> float | None:
        """Arrivals expected; None without any word."""
        if all(source == "none" for source in self.sources(now_s).values()):
            return None
        return round(sum(demand.arrivals_rps for demand in self.models(now_s)), 3)

    def _age_s(self, model_id: str, now_s: float) -> float | None:
        heard = self._forecasts.get(model_id)
        return None if heard is None else round(now_s - heard.at_s, 3)

    def _source(self, model_id: str, now_s: float) -> Source:
        heard, windows = self._forecasts.get(model_id), self._windows.get(model_id)
        if heard is not None and now_s - heard.at_s <= self._limit_s(heard.forecast):
            return "forecast"
        fresh = windows is not None and now_s - windows.at_s <= self._window_limit_s(windows.newest)
        if windows is not None and fresh and (heard is not None or windows.alone >= WINDOWS_ALONE):
            return "observed"
        return "none" if heard is None else "stale"

    def _demand(self, model_id: str, now_s: float) -> ModelDemand:
        heard, windows = self._forecasts.get(model_id), self._windows.get(model_id)
        source = self._source(model_id, now_s)
        outlived = heard and windows and windows.at_s > heard.at_s and source == "stale"
        types: tuple[TypeForecast, ...] = ()
        horizon_s = 0.0
        if windows and (source == "observed" or outlived):
            types, horizon_s = _observed(windows.newest), windows.newest.window_s
        elif heard and source != "none":
            types, horizon_s = heard.forecast.types, heard.forecast.horizon_s
        types = self._floor(model_id, types) if self._floored else types
        types = tuple(kind for kind in types if _plausible(kind))[:TYPES_MAX]
        horizon_s = horizon_s if isfinite(horizon_s) and horizon_s > 0.0 else 0.0
        return ModelDemand(
            model_id=model_id, types=types or self._nominal(model_id, now_s), horizon_s=horizon_s
        )

    def _floor(self, model_id: str, types: tuple[TypeForecast, ...]) -> tuple[TypeForecast, ...]:
        """``types`` at what arrived of them recently, at least; and those that did, and that the
        newest window knows the lengths of, where the forecast leaves them out."""
        floors = self._past.floors(model_id)
        windows = self._windows.get(model_id)
        missing = floors.keys() - {kind.request_type for kind in types}
        seen = _observed(windows.newest) if windows and missing else ()
        left_out = tuple(kind for kind in seen if kind.request_type in missing)
        return tuple(
            _at_least(kind, floors.get(kind.request_type, 0.0)) for kind in (*types, *left_out)
        )

    def _nominal(self, model_id: str, now_s: float) -> tuple[TypeForecast, ...]:
        windows = self._windows.get(model_id)
        if windows is None or now_s - windows.unserved_s > WANTED_S:
            return ()
        window_s = max(1.0, windows.newest.window_s)
        rps = min(RATE_MAX, max(WANTED_RPS_MIN, windows.unserved / window_s))
        return (
            TypeForecast(
                request_type=0,
                arrivals_rps=rps,
                input_tokens_mean=WANTED_INPUT_TOKENS,
                output_tokens_mean=WANTED_OUTPUT_TOKENS,
                method=NOMINAL,
            ),
        )

    def _limit_s(self, report: ForecastReport) -> float:
        return self._stale_s or STALE_HORIZONS * _bounded(report.horizon_s)

    def _window_limit_s(self, report: DemandReport) -> float:
        return self._stale_s or STALE_HORIZONS * _bounded(report.window_s)


def _is_nominal(types: tuple[TypeForecast, ...]) -> bool:
    return any(kind.method == NOMINAL for kind in types)


def _observed(window: DemandReport) -> tuple[TypeForecast, ...]:
    return tuple(
        TypeForecast(
            request_type=seen.request_type,
            arrivals_rps=seen.arrivals_rps,
            input_tokens_mean=seen.input_tokens_mean,
            output_tokens_mean=seen.output_tokens_mean,
            method="observed",
            class_shares=seen.class_shares,
        )
        for seen in window.types
    )


def _bounded(seconds: float) -> float:
    """Not a number is the least."""
    return min(HORIZON_S_MAX, max(HORIZON_S_MIN, seconds if isfinite(seconds) else 0.0))


def _plausible(kind: TypeForecast) -> bool:
    """Whether a policy may divide by it. Not a number compares as false."""
    return (
        RATE_MIN <= kind.arrivals_rps <= RATE_MAX
        and TOKENS_MIN <= kind.input_tokens_mean <= TOKENS_MAX
        and 0.0 <= kind.output_tokens_mean <= TOKENS_MAX
    )


def _at_least(kind: TypeForecast, rps: float) -> TypeForecast:
    return kind if kind.arrivals_rps >= rps else msgspec.structs.replace(kind, arrivals_rps=rps)
