"""Forecaster core: how many requests of each type come next?

One forecast per demand report. The history is stored after each report, so that a restart neither
forgets which predictor is better nor takes its own absence for a lack of traffic.
"""

from math import isfinite
from typing import assert_never

from services.forecaster.config import ForecasterConfig
from services.forecaster.predictors import Track
from shared import subjects
from shared.core import (
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Query,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.messages.demand import (
    DemandReport,
    ForecasterState,
    ForecastReport,
    ModelTracks,
    TypeDemand,
)

INPUTS = (subjects.DEMAND_REPORT,)
STATE_KEY = "forecaster"

ForecasterEvent = (
    Started
    | Loaded
    | Stored
    | StoreConflict
    | Draining
    | DemandReport
    | Query  # published with a reply address, which none of our inputs has
)


class Model:
    """One model's types, and where its last window ended."""

    def __init__(self, window_end_s: float) -> None:
        self.window_end_s = window_end_s
        self.tracks: dict[int, Track] = {}


class Forecaster:
    def __init__(self, config: ForecasterConfig, *, unix_offset_s: float) -> None:
        """``unix_offset_s`` turns the core's monotonic time into the report's unix time."""
        self._config = config
        self._unix_offset_s = unix_offset_s
        self._models: dict[str, Model] = {}
        self._loaded = False
        self._waiting: dict[str, DemandReport] = {}
        self._revision = 0
        self._storing = False

    def step(  # noqa: PLR0911  # one case per event
        self, event: ForecasterEvent, now_s: float
    ) -> list[Effect]:
        match event:
            case DemandReport():
                return self._on_demand(event, now_s)
            case Started():
                return [Load(STATE_KEY, ForecasterState)]
            case Loaded():
                return self._on_loaded(event, now_s)
            case Stored():
                self._storing, self._revision = False, event.revision
                return []
            case StoreConflict():
                # We are the only writer: another forecaster runs. Learn the revision and go on.
                self._storing = False
                fields = {"key": STATE_KEY, "remedy": "run one forecaster"}
                return [
                    Log("forecaster.state_conflict", fields, "warning"),
                    Load(STATE_KEY, ForecasterState),
                ]
            case Query():
                fields = {"message_type": type(event.message).__name__}
                return [Log("forecaster.question_unknown", fields, "warning")]
            case Draining():
                return []  # stored after each report
            case _:
                assert_never(event)

    def check(self) -> None:
        config = self._config
        assert len(self._models) <= config.models_max, len(self._models)
        assert len(self._waiting) <= config.models_max, len(self._waiting)
        for model in self._models.values():
            assert len(model.tracks) <= config.types_max, len(model.tracks)
            for track in model.tracks.values():
                track.check()

    def _on_loaded(self, event: Loaded, now_s: float) -> list[Effect]:
        self._revision = event.revision
        if self._loaded:
            return []  # after a conflict: only the revision was wanted
        self._loaded = True
        state = event.message
        if isinstance(state, ForecasterState):
            for stored in state.models[: self._config.models_max]:
                model = self._models[stored.model_id] = Model(stored.window_end_s)
                for track in stored.types[: self._config.types_max]:
                    model.tracks[track.request_type] = Track(self._config, track)
        waiting, self._waiting = self._waiting, {}
        return [e for report in waiting.values() for e in self._on_demand(report, now_s)]

    def _on_demand(self, report: DemandReport, now_s: float) -> list[Effect]:
        if not _plausible(report):
            fields = {"model_id": report.model_id, "window_s": report.window_s}
            return [Log("forecaster.report_invalid", fields, "warning")]
        known = self._models if self._loaded else self._waiting
        if report.model_id not in known and len(known) >= self._config.models_max:
            fields = {"model_id": report.model_id, "models_max": self._config.models_max}
            return [Log("forecaster.too_many_models", fields, "warning")]
        if not self._loaded:
            self._waiting[report.model_id] = report
            return []
        model = self._models.get(report.model_id)
        if model is None:
            model = self._models[report.model_id] = Model(report.window_start_s)
        missing = self._missing(model, report)
        if missing is None:
            fields = {"model_id": report.model_id, "window_start_s": report.window_start_s}
            return [Log("forecaster.report_late", fields, "debug")]
        model.window_end_s = report.window_start_s + report.window_s
        changed = self._observe(model, report, missing)
        horizon_s = self._config.horizon_windows * report.window_s
        tracks = [model.tracks[number] for number in sorted(model.tracks)]
        forecast = ForecastReport(
            model_id=report.model_id,
            made_at_s=now_s + self._unix_offset_s,
            horizon_s=horizon_s,
            types=tuple(track.forecast(horizon_s=horizon_s) for track in tracks),
        )
        effects: list[Effect] = [subjects.FORECAST_REPORT.send(forecast)]
        if missing:
            fields = {"model_id": report.model_id, "windows": missing}
            effects.append(Log("forecaster.windows_missing", fields, "warning"))
        if changed:
            fields = {"model_id": report.model_id, "methods": changed}
            effects.append(Log("forecaster.method_changed", fields))
        return effects + self._store()

    def _missing(self, model: Model, report: DemandReport) -> int | None:
        """Windows lost between the last one and this; None if this one is repeated or overtaken.
        One from much earlier than that is not late: the profiler's clock was set back."""
        windows = (report.window_start_s - model.window_end_s) / report.window_s
        if -self._config.errors_max < windows < -0.5:  # noqa: PLR2004  # half a window
            return None
        return max(0, round(windows))

    def _observe(self, model: Model, report: DemandReport, missing: int) -> dict[str, str]:
        """Let each type take its window; those no longer reported are forgotten. The types whose
        better predictor changed."""
        changed: dict[str, str] = {}
        tracks: dict[int, Track] = {}
        for demand in report.types[: self._config.types_max]:
            if not _finite(demand):
                continue
            track = model.tracks.get(demand.request_type)
            if track is None:
                track = Track(self._config, demand)
            before = track.method
            track.observe(demand, missing=missing)
            if track.method != before:
                changed[str(demand.request_type)] = track.method
            tracks[demand.request_type] = track
        model.tracks = tracks
        return changed

    def _store(self) -> list[Effect]:
        """Write the tracks. While a write is under way none is started: the next report's will
        hold the newer state anyway."""
        if self._storing:
            return []
        self._storing = True
        state = ForecasterState(
            models=tuple(
                ModelTracks(
                    model_id=model_id,
                    window_end_s=model.window_end_s,
                    types=tuple(track.stored() for track in model.tracks.values()),
                )
                for model_id, model in self._models.items()
            )
        )
        return [Store(STATE_KEY, state, self._revision)]


def _plausible(report: DemandReport) -> bool:
    return isfinite(report.window_start_s) and isfinite(report.window_s) and report.window_s > 0.0


def _finite(demand: TypeDemand) -> bool:
    values = (demand.arrivals_rps, demand.input_tokens_mean, demand.output_tokens_mean)
    return all(isfinite(value) and value >= 0.0 for value in values)
