"""What the profiler saw, and what the forecaster expects."""

import msgspec

from shared.messages.base import Message


class TypeDemand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Requests of one type in a window. Lengths are means over the window's requests.
    ``class_shares``: of its requests, by SLO class; empty: not said, "standard"."""

    request_type: int
    requests: int
    arrivals_rps: float
    input_tokens_mean: float
    output_tokens_mean: float
    input_tokens_centroid: float
    output_tokens_centroid: float
    ttft_s_mean: float | None = None
    tpot_s_mean: float | None = None
    class_shares: dict[str, float] = msgspec.field(default_factory=dict[str, float])


class TypeArrivals(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one type by when they arrived."""

    request_type: int
    arrivals_rps: float


class DemandReport(Message, frozen=True, kw_only=True):
    """Arrivals by type in one window of completed requests; times are unix seconds.

    ``types`` count requests when they end, at once. ``settled`` counts those of an earlier window
    when they arrived: a burst in its true height. It is from ``settled_start_s`` on and
    ``settled_s`` long; 0: no window is settled yet.
    """

    model_id: str
    window_start_s: float
    window_s: float
    types: tuple[TypeDemand, ...] = ()
    completed: int = 0
    aborted: int = 0
    rejected: int = 0
    failed: int = 0
    settled_start_s: float = 0.0
    settled_s: float = 0.0
    settled: tuple[TypeArrivals, ...] = ()


class TypeForecast(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Expected arrivals of one type over the horizon, with the race's running errors. Between
    ``arrivals_rps_p10`` and ``_p90`` the mean over the horizon falls four times in five; None while
    too little is known to say so. ``class_shares`` as in ``TypeDemand``."""

    request_type: int
    arrivals_rps: float
    input_tokens_mean: float
    output_tokens_mean: float
    method: str = ""
    error_rps_mae: float | None = None
    arrivals_rps_p10: float | None = None
    arrivals_rps_p90: float | None = None
    class_shares: dict[str, float] = msgspec.field(default_factory=dict[str, float])


class ForecastReport(Message, frozen=True, kw_only=True):
    model_id: str
    made_at_s: float
    horizon_s: float
    types: tuple[TypeForecast, ...] = ()


class TypeCentroid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Centre of one type: mean of ln(1 + tokens). ``weight`` is the count behind it, capped."""

    request_type: int
    input_ln: float
    output_ln: float
    weight: float
    idle_windows: int = 0


class ModelTypes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    model_id: str
    types: tuple[TypeCentroid, ...] = ()


class ProfilerState(Message, frozen=True, kw_only=True):
    """What the profiler stores each window, so that type numbers survive its restart."""

    models: tuple[ModelTypes, ...] = ()


class TypeTrack(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the forecaster remembers of one type: its predictors, and how far each was off: what
    came less what it had said."""

    request_type: int
    last_rps: float
    ewma_rps: float
    input_tokens_mean: float
    output_tokens_mean: float
    last_errors: tuple[float, ...] = ()
    ewma_errors: tuple[float, ...] = ()


class ModelTracks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    model_id: str
    window_end_s: float
    types: tuple[TypeTrack, ...] = ()


class ForecasterState(Message, frozen=True, kw_only=True):
    """What the forecaster stores after each report, so that its race survives a restart."""

    models: tuple[ModelTracks, ...] = ()
