"""Profiler core: which types of request arrived, how many, and how long were they?

Per model, fixed windows of completed requests. Each completion is added to sums as it comes, so
memory does not grow with the rate. A report leaves at the end of every window, also of an empty
one: "nothing arrived" and "the profiler is away" must look different to the forecaster.
"""

from dataclasses import dataclass, field
from math import log1p
from typing import assert_never

from services.profiler.arrivals import Arrivals
from services.profiler.config import ProfilerConfig
from services.profiler.kmeans import Centre, OnlineKMeans, Point
from services.profiler.window import Window
from shared import subjects
from shared.core import (
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Query,
    SetTimer,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.messages.base import Message
from shared.messages.demand import DemandReport, ModelTypes, ProfilerState, TypeCentroid
from shared.messages.requests import RequestCompleted, RequestsCompleted

INPUTS = (subjects.REQUESTS_COMPLETED,)
STATE_KEY = "profiler"


class WindowDeadline(Message, frozen=True, kw_only=True):
    """Timer: the window ends."""


ProfilerEvent = (
    Started
    | Loaded
    | Stored
    | StoreConflict
    | WindowDeadline
    | Draining
    | RequestsCompleted
    | Query  # published with a reply address, which none of our inputs has
)


@dataclass(slots=True)
class Model:
    """One model's types, its present window, and what waits for the types to exist."""

    types: OnlineKMeans
    arrivals: Arrivals
    window: Window = field(default_factory=Window)
    former_ids: set[str] = field(default_factory=set[str])
    unplaced: list[tuple[RequestCompleted, float]] = field(
        default_factory=list[tuple[RequestCompleted, float]]
    )  # with when it arrived


class Profiler:
    def __init__(
        self, config: ProfilerConfig, *, models: tuple[str, ...], unix_offset_s: float
    ) -> None:
        """``unix_offset_s`` turns the core's monotonic time into the report's unix time."""
        self._config = config
        self._unix_offset_s = unix_offset_s
        self._models = {model_id: self._new_model(0.0) for model_id in models}
        self._window_start_s = 0.0
        self._loaded = False
        self._revision = 0
        self._storing = False

    def step(  # noqa: PLR0911  # one case per event
        self, event: ProfilerEvent, now_s: float
    ) -> list[Effect]:
        match event:
            case RequestsCompleted():
                for done in event.completed:
                    self._on_completed(done, now_s)
            case Query():
                fields = {"message_type": type(event.message).__name__}
                return [Log("profiler.question_unknown", fields, "warning")]
            case WindowDeadline():
                return [*self._report(now_s), *self._store(), self._next_window(now_s)]
            case Draining():
                return self._store()  # no report: the rates of a window cut short mislead
            case Started():
                return [Load(STATE_KEY, ProfilerState), self._next_window(now_s)]
            case Loaded():
                return self._on_loaded(event, now_s)
            case Stored():
                self._storing, self._revision = False, event.revision
            case StoreConflict():
                # We are the only writer: another profiler runs. Learn the revision, keep our types.
                self._storing = False
                fields = {"key": STATE_KEY, "remedy": "run one profiler"}
                return [
                    Log("profiler.state_conflict", fields, "warning"),
                    Load(STATE_KEY, ProfilerState),
                ]
            case _:
                assert_never(event)
        return []

    def check(self) -> None:
        config = self._config
        assert len(self._models) <= config.models_max, len(self._models)
        for model in self._models.values():
            window = model.window
            assert len(model.types.centres) == config.types_max
            assert len(window.request_ids) <= config.requests_max
            assert len(model.unplaced) <= config.seed_samples
            assert len(model.arrivals) <= config.settle_windows + 1
            live = {number for number, _ in model.types.live()}
            assert window.sums.keys() <= live, (window.sums.keys(), live)

    # Completions

    def _on_completed(self, done: RequestCompleted, now_s: float) -> None:
        model = self._model_of(done, now_s)
        if model is None:
            return
        window = model.window
        if done.request_id in window.request_ids or done.request_id in model.former_ids:
            return  # a repeated message
        if len(window.request_ids) >= self._config.requests_max:
            window.dropped += 1
            return
        window.request_ids.add(done.request_id)
        window.outcomes[done.outcome] = window.count(done.outcome) + 1
        arrived_s = now_s - max(0.0, done.e2e_s)
        if done.outcome != "completed":
            if model.types.seeded and done.input_tokens > 0:
                number = model.types.nearest_by_input(log1p(done.input_tokens))
                window.of(number).others += 1
                model.arrivals.add(number, arrived_s=arrived_s)
        elif model.types.seeded:
            self._place(model, done, arrived_s)
        elif len(model.unplaced) < self._config.seed_samples:
            model.unplaced.append((done, arrived_s))
            if self._loaded and len(model.unplaced) == self._config.seed_samples:
                self._seed(model)
        else:
            window.dropped += 1

    def _model_of(self, done: RequestCompleted, now_s: float) -> Model | None:
        """Clients may name any model: only one that has completed a request gets state."""
        model = self._models.get(done.model_id)
        full = len(self._models) >= self._config.models_max
        if model is None and done.outcome == "completed" and not full:
            model = self._models[done.model_id] = self._new_model(now_s)
        return model

    def _new_model(self, now_s: float) -> Model:
        config = self._config
        types = OnlineKMeans(
            size=config.types_max,
            memory=config.memory_requests,
            refine_ln=config.refine_ln,
            refine_samples=config.refine_samples,
            coarsen_ln=config.coarsen_ln,
        )
        return Model(types, Arrivals(settle_windows=config.settle_windows, start_s=now_s))

    def _place(self, model: Model, done: RequestCompleted, arrived_s: float) -> None:
        placed = model.types.add(_point(done))
        if placed.merged_into is not None:
            model.window.merge(placed.number, placed.merged_into)
            model.arrivals.merge(placed.number, placed.merged_into)
        model.window.of(placed.number).add(done)
        model.arrivals.add(placed.number, arrived_s=arrived_s)

    def _seed(self, model: Model) -> None:
        """Make the first types and place by them what has waited."""
        model.types.seed([_point(done) for done, _ in model.unplaced])
        for done, arrived_s in model.unplaced:
            number = model.types.nearest(_point(done))[0]
            model.window.of(number).add(done)
            model.arrivals.add(number, arrived_s=arrived_s)
        model.unplaced.clear()

    # Windows

    def _next_window(self, now_s: float) -> SetTimer:
        self._window_start_s = now_s
        return SetTimer(now_s + self._config.window_s, WindowDeadline())

    def _report(self, now_s: float) -> list[Effect]:
        window_s = now_s - self._window_start_s
        if window_s <= 0.0:
            return []
        effects: list[Effect] = []
        for model_id, model in self._models.items():
            if self._loaded and model.unplaced:
                self._seed(model)
            window = model.window
            settled_s, length_s, settled = model.arrivals.turn(now_s) or (None, 0.0, ())
            report = DemandReport(
                model_id=model_id,
                window_start_s=self._window_start_s + self._unix_offset_s,
                window_s=window_s,
                types=tuple(
                    window.of(number).demand(number, centre, window_s=window_s)
                    for number, centre in model.types.live()
                ),
                completed=window.count("completed"),
                aborted=window.count("aborted"),
                rejected=window.count("rejected"),
                failed=window.count("failed"),
                settled_start_s=0.0 if settled_s is None else settled_s + self._unix_offset_s,
                settled_s=length_s,
                settled=settled,
            )
            effects.append(subjects.DEMAND_REPORT.send(report))
            if window.dropped:
                fields = {"model_id": model_id, "dropped": window.dropped}
                effects.append(Log("profiler.requests_dropped", fields, "warning"))
            model.former_ids, model.window = window.request_ids, Window()
            retired = model.types.end_window(idle_windows_max=self._config.idle_windows_max)
            if retired:
                model.arrivals.forget(retired)
                fields = {"model_id": model_id, "types": retired}
                effects.append(Log("profiler.types_retired", fields))
        self._window_start_s = now_s
        return effects

    # State

    def _on_loaded(self, event: Loaded, now_s: float) -> list[Effect]:
        self._revision = event.revision
        if self._loaded:
            return []  # after a conflict: only the revision was wanted
        self._loaded = True
        state = event.message
        if not isinstance(state, ProfilerState):
            return []
        for stored in state.models[: self._config.models_max]:
            if stored.model_id not in self._models:
                if len(self._models) >= self._config.models_max:
                    continue
                self._models[stored.model_id] = self._new_model(now_s)
            self._restore(self._models[stored.model_id], stored)
        fields = {m.model_id: len(m.types) for m in state.models}
        return [Log("profiler.types_restored", {"types": fields})]

    def _restore(self, model: Model, stored: ModelTypes) -> None:
        """Take the stored centres, as far as their numbers still fit, and place what waited."""
        for t in stored.types:
            if 0 <= t.request_type < self._config.types_max:
                model.types.centres[t.request_type] = Centre(
                    t.input_ln, t.output_ln, max(1.0, t.weight), t.idle_windows
                )
        if model.types.seeded:
            waited, model.unplaced = model.unplaced, []
            for done, arrived_s in waited:
                self._place(model, done, arrived_s)

    def _store(self) -> list[Effect]:
        """Write the centres. While a write is under way none is started: the next window's will
        hold the newer state anyway."""
        if not self._loaded or self._storing:
            return []
        self._storing = True
        state = ProfilerState(
            models=tuple(
                ModelTypes(model_id=model_id, types=_centroids(model))
                for model_id, model in self._models.items()
            )
        )
        return [Store(STATE_KEY, state, self._revision)]


def _centroids(model: Model) -> tuple[TypeCentroid, ...]:
    return tuple(
        TypeCentroid(
            request_type=number,
            input_ln=centre.x,
            output_ln=centre.y,
            weight=centre.weight,
            idle_windows=centre.idle_windows,
        )
        for number, centre in model.types.live()
    )


def _point(done: RequestCompleted) -> Point:
    return log1p(max(0, done.input_tokens)), log1p(max(0, done.output_tokens))
