"""A window of a trace as the demand that a plan is asked for.

Types are made as the profiler makes its first ones: k-means on the logarithms of input and output
length, the centres from a sample spread evenly over the window, the shortest requests type 0. Each
request then counts for the type whose centre is nearest, and a type's lengths are its mean ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log1p

from loadgen.compare.asked import workload_of
from loadgen.compare.workload import Typed, Workload, typed_windows
from loadgen.planning.demand import Expected
from loadgen.workload.arrivals import NothingSelected
from loadgen.workload.records import TraceRecord
from services.profiler.config import ProfilerConfig
from services.profiler.kmeans import OnlineKMeans, Point
from services.scheduler.policies.interface import ModelDemand
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig
from shared.messages.demand import TypeForecast
from shared.slo import SloClass

WINDOW_S = 300.0
WINDOW_S_MAX = 1e7
SAMPLE_MAX = 512  # requests behind the centres: seeding takes their number squared
SILENT_SHARE = 0.1  # of a window without a request at its end: the trace may have ended
USUAL: SloClass = "standard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which part of the traces, in seconds of their own clocks; ``slo_class`` is that of requests
    whose trace names none."""

    at_s: float
    length_s: float = WINDOW_S
    slo_class: SloClass = USUAL

    def checked(self) -> "Window":
        """Self, if it has a beginning and an end; raises ConfigInvalid."""
        if not 0.0 <= self.at_s < WINDOW_S_MAX:
            raise ConfigInvalid(
                field="--at", value=self.at_s, remedy=f"use 0 to {WINDOW_S_MAX:g} s of the trace"
            )
        if not 0.0 < self.length_s <= WINDOW_S_MAX:
            raise ConfigInvalid(
                field="--for",
                value=self.length_s,
                remedy=f"use more than 0 s, up to {WINDOW_S_MAX:g}",
            )
        return self


def trace_demand(
    traces: Mapping[str, str], mesh: MeshConfig, window: Window, *, types_max: int = 0
) -> Expected:
    """What the traces, by model, bring in ``window``; ``types_max`` of each model, the profiler's
    own number if 0. A model whose trace has nothing there is expected to get nothing; raises
    NothingSelected if that is so for all, and OServeError for traces that cannot be read."""
    profiler = ProfilerConfig()
    size = types_max or profiler.types_max
    models: list[ModelDemand] = []
    notes: list[str] = []
    empty: NothingSelected | None = None
    for name, path in traces.items():
        workload = workload_of(
            {name: path},
            mesh,
            start_s=window.at_s,
            duration_s=window.length_s,
            slo_class=window.slo_class,
        )
        model_id = name or mesh.model.model_id
        try:
            typed = _read(workload)
        except NothingSelected as error:
            empty = error
            notes.append(f"{model_id}: {error}")
            models.append(ModelDemand(model_id=model_id, types=(), horizon_s=window.length_s))
            continue
        models.append(_demand(model_id, typed.records, window, profiler, size))
        silent_s = window.length_s - typed.records[-1].timestamp_s
        if silent_s > SILENT_SHARE * window.length_s:
            notes.append(f"{model_id}: nothing arrives in the window's last {silent_s:,.0f} s")
        if typed.cut:
            limit = mesh.model_of(model_id).context_tokens_max
            notes.append(
                f"{model_id}: {typed.cut:,} of {len(typed.records):,} prompts were cut to the "
                f"context of {limit:,} tokens (context_tokens_max)"
            )
    if empty is not None and not any(model.types for model in models):
        raise empty
    several = len(traces) > 1
    source = ", ".join(f"{name}={path}" if several else path for name, path in traces.items())
    return Expected(
        models=tuple(models),
        names={},
        source=f"{source}, {window.at_s:g} to {window.at_s + window.length_s:g} s",
        notes=tuple(notes),
    )


def _read(workload: Workload) -> Typed:
    return typed_windows(workload)[0]


def _demand(
    model_id: str,
    records: Sequence[TraceRecord],
    window: Window,
    profiler: ProfilerConfig,
    size: int,
) -> ModelDemand:
    types = OnlineKMeans(
        size=size,
        memory=profiler.memory_requests,
        refine_ln=profiler.refine_ln,
        refine_samples=profiler.refine_samples,
        coarsen_ln=profiler.coarsen_ln,
    )
    stride = -(-len(records) // SAMPLE_MAX)
    types.seed([_point(record) for record in records[::stride]])
    groups: dict[int, list[TraceRecord]] = {}
    for record in records:
        groups.setdefault(types.nearest(_point(record))[0], []).append(record)
    return ModelDemand(
        model_id=model_id,
        types=tuple(
            _forecast(number, group, window.length_s) for number, group in sorted(groups.items())
        ),
        horizon_s=window.length_s,
    )


def _forecast(number: int, records: Sequence[TraceRecord], length_s: float) -> TypeForecast:
    count = len(records)
    classes = Counter(record.slo_class or USUAL for record in records)
    unlike = classes.keys() != {USUAL}
    return TypeForecast(
        request_type=number,
        arrivals_rps=count / length_s,
        input_tokens_mean=sum(record.input_tokens for record in records) / count,
        output_tokens_mean=sum(record.output_tokens for record in records) / count,
        method="trace",
        class_shares={name: n / count for name, n in sorted(classes.items())} if unlike else {},
    )


def _point(record: TraceRecord) -> Point:
    return log1p(record.input_tokens), log1p(record.output_tokens)
