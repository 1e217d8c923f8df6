"""The arrivals of a comparison: one trace for each model, a window of it, thinned by load and seed.

All policies get the same ones: they depend on (traces, window, rate scale, seed) alone. A record's
type is its label; where it has none, its kind (loadgen/workload/kinds.py), split by the model's
whole window, so that a type means the same at every load. A record that names an SLO class other
than the comparison's has it in its type: ``code@batch``.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec

from loadgen.simulator.outcome import Traffic
from loadgen.workload.arrivals import Selection, select
from loadgen.workload.kinds import split_of
from loadgen.workload.readers import read_trace
from loadgen.workload.records import TraceRecord
from shared.slo import SloClass

HISTORY_WINDOW_S = 10.0
_READ_BYTES = 1 << 20
_SEEDS_APART = 100_003  # models that share a trace are thinned by unlike draws


class TraceOfModel(msgspec.Struct, frozen=True, kw_only=True):
    """``digest`` is of the file's content; ``context_tokens_max`` is the model's."""

    model_id: str
    path: str
    digest: str
    context_tokens_max: int


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """``window_s``: how long arrivals last, the warm-up included."""

    traces: tuple[TraceOfModel, ...]
    start_s: float
    window_s: float
    slo_class: SloClass = "standard"


@dataclass(frozen=True, slots=True)
class TypeMean:
    """One type in the window: how many requests at scale 1, their mean lengths."""

    model_id: str
    label: str
    slo_class: SloClass
    requests: int
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Typed:
    """The window of one model's trace at scale 1, types in place of labels; ``cut`` counts the
    prompts that were cut to leave their output room in the model's context."""

    trace: TraceOfModel
    records: tuple[TraceRecord, ...]
    types: tuple[TypeMean, ...]
    cut: int


def file_digest(path: Path) -> str:
    """Of the file's content; raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def arrivals(workload: Workload, *, rate_scale: float, seed: int) -> list[Traffic]:
    """What each model is asked; times count from the window's start."""
    traffic: list[Traffic] = []
    for number, typed in enumerate(typed_windows(workload)):
        selection = Selection(
            duration_s=workload.window_s, rate_scale=rate_scale, seed=seed + number * _SEEDS_APART
        )
        traffic.append(
            Traffic(model_id=typed.trace.model_id, records=select(typed.records, selection))
        )
    return traffic


@lru_cache(maxsize=2)
def typed_windows(workload: Workload) -> tuple[Typed, ...]:
    """The traces' windows, read once in each process. Raises TraceInvalid, NothingSelected."""
    return tuple(_typed(workload, trace) for trace in workload.traces)


def history(workload: Workload, until_s: float) -> tuple[TypeMean, ...]:
    """What arrived before ``until_s``, at scale 1, by kind whatever its label: what a scheduler
    that finds its own types could know by then. Nothing if nothing had arrived."""
    found: list[TypeMean] = []
    for typed in typed_windows(workload):
        past = [record for record in typed.records if record.timestamp_s < until_s]
        if past:
            split = split_of(past)
            kinds = [msgspec.structs.replace(r, label=split.kind(r)) for r in past]
            found += _means(typed.trace.model_id, kinds, workload.slo_class)
    return tuple(found)


def history_windows(
    workload: Workload, until_s: float, *, rate_scale: float, window_s: float = HISTORY_WINDOW_S
) -> dict[str, list[tuple[float, dict[int, float]]]]:
    """By model, windows from the start to ``until_s``, whole ones only: their length and requests/s
    of each kind in ``history``, by its place there among the model's."""
    count = int(until_s / window_s)
    found: dict[str, list[tuple[float, dict[int, float]]]] = {}
    for typed in typed_windows(workload):
        past = [record for record in typed.records if record.timestamp_s < until_s]
        if not past:
            continue
        split = split_of(past)
        places = {kind: place for place, kind in enumerate(sorted({split.kind(r) for r in past}))}
        rates: list[dict[int, float]] = [{} for _ in range(count)]
        for record in past:
            at = int(record.timestamp_s / window_s)
            if at < count:
                place = places[split.kind(record)]
                rates[at][place] = rates[at].get(place, 0.0) + rate_scale / window_s
        found[typed.trace.model_id] = [(window_s, window) for window in rates]
    return found


def last_arrival_s(path: str, start_s: float) -> float:
    """Seconds from ``start_s`` to the last request of the trace."""
    records = select(read_trace(path), Selection(start_s=start_s))
    return records[-1].timestamp_s


def busiest_start_s(workload: Workload, length_s: float) -> float:
    """Where, in the window, the ``length_s`` with the most tokens begin; to a quarter of them."""
    if length_s >= workload.window_s:
        return 0.0
    step_s = length_s / 4
    buckets = [0] * (math.ceil(workload.window_s / step_s) + 1)
    for typed in typed_windows(workload):
        for record in typed.records:
            tokens = record.input_tokens + record.output_tokens
            buckets[int(record.timestamp_s / step_s)] += tokens
    starts = range(int((workload.window_s - length_s) / step_s) + 1)
    return step_s * max(starts, key=lambda place: (sum(buckets[place : place + 4]), -place))


def _typed(workload: Workload, trace: TraceOfModel) -> Typed:
    window = Selection(start_s=workload.start_s, duration_s=workload.window_s)
    records = select(read_trace(trace.path), window)
    cut = [_cut(record, trace.context_tokens_max) for record in records]
    labelled = _labelled(cut, workload.slo_class)
    return Typed(
        trace=trace,
        records=labelled,
        types=_means(trace.model_id, labelled, workload.slo_class),
        cut=sum(a.input_tokens != b.input_tokens for a, b in zip(records, cut, strict=True)),
    )


def _cut(record: TraceRecord, context_tokens_max: int) -> TraceRecord:
    output_tokens = min(record.output_tokens, context_tokens_max - 1)
    input_tokens = min(record.input_tokens, context_tokens_max - output_tokens)
    if (input_tokens, output_tokens) == (record.input_tokens, record.output_tokens):
        return record
    return msgspec.structs.replace(record, input_tokens=input_tokens, output_tokens=output_tokens)


def _labelled(records: Sequence[TraceRecord], usual: SloClass) -> tuple[TraceRecord, ...]:
    split = split_of(records)
    labelled: list[TraceRecord] = []
    for record in records:
        label = record.label or split.kind(record)
        if record.slo_class not in (None, usual):
            label += f"@{record.slo_class}"
        slo_class = record.slo_class or usual
        labelled.append(msgspec.structs.replace(record, label=label, slo_class=slo_class))
    return tuple(labelled)


def _means(model_id: str, records: Sequence[TraceRecord], usual: SloClass) -> tuple[TypeMean, ...]:
    groups: dict[str, list[TraceRecord]] = {}
    for record in records:
        groups.setdefault(record.label, []).append(record)
    return tuple(
        TypeMean(
            model_id=model_id,
            label=label,
            slo_class=group[0].slo_class or usual,
            requests=len(group),
            input_tokens=sum(record.input_tokens for record in group) / len(group),
            output_tokens=sum(record.output_tokens for record in group) / len(group),
        )
        for label, group in sorted(groups.items())
    )
