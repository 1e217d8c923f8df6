"""The last minutes' arrivals by type, as they are settled: what plans are rehearsed with."""

from collections import deque
from collections.abc import Collection, Mapping
from math import isfinite

from services.scheduler.policies.interface import PastWindow
from shared.messages.demand import DemandReport

KEPT_S = 1200.0
WINDOWS_MAX = 240
TYPES_MAX = 256
RECENT_S = 300.0
FLOOR = 0.7  # of what arrived recently: a forecast below that is not believed
FLOOR_WINDOWS_MIN = 6
APART_S_MAX = 0.5  # between a window's end and the next one's start, in windows: more is a gap


class Past:
    """Bounded: ``KEPT_S`` and ``WINDOWS_MAX`` of windows for each model of the topology. Reports
    may be lost, late and repeated; what comes after a gap begins a new past, since windows are
    played back to back."""

    def __init__(self, models: Collection[str]) -> None:
        self._windows: dict[str, deque[PastWindow]] = {model_id: deque() for model_id in models}
        self._ends_s: dict[str, float] = {}

    def window(self, report: DemandReport) -> None:
        """Take in what the report says is settled, if that is news."""
        known = self._windows.get(report.model_id)
        start_s, length_s = report.settled_start_s, report.settled_s
        if known is None or not (isfinite(start_s) and 0.0 < length_s <= KEPT_S):
            return
        ends_s = self._ends_s.get(report.model_id)
        if ends_s is not None:
            gap = (start_s - ends_s) / length_s
            if -WINDOWS_MAX < gap < -APART_S_MAX:
                return  # repeated or overtaken; from longer ago: the profiler's clock was set back
            if abs(gap) > APART_S_MAX:
                known.clear()
        self._ends_s[report.model_id] = start_s + length_s
        rates = {
            kind.request_type: kind.arrivals_rps
            for kind in report.settled[:TYPES_MAX]
            if isfinite(kind.arrivals_rps) and kind.arrivals_rps >= 0.0
        }
        known.append(PastWindow(seconds=length_s, arrivals_rps=rates))
        while len(known) > WINDOWS_MAX or sum(window.seconds for window in known) > KEPT_S:
            known.popleft()

    @property
    def windows(self) -> Mapping[str, tuple[PastWindow, ...]]:
        """By model, the oldest first; models without any are left out."""
        return {model_id: tuple(known) for model_id, known in self._windows.items() if known}

    def floors(self, model_id: str) -> dict[int, float]:
        """Requests/s by type below which no forecast is believed. Forecasts are made of requests
        that have ended: while replicas are overloaded, or change, few do, and demand seems to
        cease just when it is too much. Empty until enough is settled."""
        recent: list[PastWindow] = []
        seconds = 0.0
        for window in reversed(self._windows.get(model_id, ())):
            if seconds >= RECENT_S:
                break
            recent.append(window)
            seconds += window.seconds
        if len(recent) < FLOOR_WINDOWS_MIN:
            return {}
        sums: dict[int, float] = {}
        for window in recent:
            for request_type, rps in window.arrivals_rps.items():
                sums[request_type] = sums.get(request_type, 0.0) + rps * window.seconds
        return {request_type: FLOOR * total / seconds for request_type, total in sums.items()}
