"""From results to a report: counts, rates, goodput and latencies, overall and per type.

Definitions, so that numbers can be compared with others':

- TTFT, E2E: from the moment the request was sent (which is when the trace says, but for ``lag_ms``)
  to its first token, to its last byte. TPOT: mean time per output token after the first.
- ITL: the gaps between arrivals of chunks; tokens that came in one chunk have no gap of their own.
- Latencies are of completed requests; a request that failed has none and counts against
  ``slo_attainment``, which is the share of *offered* requests that met both targets of their class.
- ``goodput_rps``: requests per second that met them. Rates divide by ``duration_s``: from the first
  instant of the replay to the last byte of the last answer.
- Percentiles interpolate linearly between order statistics (type 7 of Hyndman and Fan, 1996).
- A record's type is its label. Where a trace has no labels, there are up to four:
  short or long input with short or long output, split at the geometric means of this replay.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from loadgen import results
from loadgen.results import RequestResult
from loadgen.timeline import Timeline, timeline
from shared.slo import DEFAULT_TARGETS, SloClass, SloTarget, meets

FORMAT = 1
"""Raised when a field of the JSON changes its meaning."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution in milliseconds, with the number of samples behind it."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class TypeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One type of request, or all of them. A spread is None where there is nothing to measure."""

    offered: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    slo_attainment: float | None
    goodput_rps: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What was replayed against what: enough to do it again."""

    command: str = ""
    trace: str = ""
    url: str = ""
    model: str = ""
    started_unix_s: float = 0.0
    oserve_version: str = ""
    options: dict[str, str | int | float | bool | None] = {}  # msgspec copies it


class Mark(msgspec.Struct, frozen=True):
    """Something that was done to the mesh while the replay ran; seconds since it began."""

    at_s: float
    text: str
    kind: Literal["loss", "switch"] = "loss"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One replay."""

    format: int = FORMAT
    about: About
    duration_s: float
    offered_rps: float
    throughput_rps: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    overall: TypeReport
    types: dict[str, TypeReport]
    errors: dict[str, int]
    error_examples: dict[str, str]
    refused_locally: int
    unsent: int  # of a replay that was interrupted
    resends: int
    in_flight_max: int
    replicas: dict[str, int]
    slo_targets: dict[SloClass, SloTarget]
    lag_ms: Spread | None
    overhead_ms: Spread | None
    timeline: Timeline
    marks: tuple[Mark, ...] = ()

    @property
    def all_completed(self) -> bool:
        sent_all = self.overall.offered > 0 and self.unsent == 0
        return sent_all and self.overall.completed == self.overall.offered


def build_report(
    results_seen: Sequence[RequestResult],
    about: About,
    *,
    targets: Mapping[SloClass, SloTarget] = DEFAULT_TARGETS,
    planned: int | None = None,
    in_flight_max: int = 0,
) -> Report:
    """The report of one replay; ``targets`` override those of their classes, ``planned`` is how
    many requests there were to send."""
    all_targets: dict[SloClass, SloTarget] = {**DEFAULT_TARGETS, **targets}
    done = [result for result in results_seen if result.completed]
    failed = [result for result in results_seen if not result.completed]
    duration_s = _duration_s(results_seen)
    labels = type_labels(results_seen)
    by_type: dict[str, list[RequestResult]] = {}
    for result, label in zip(results_seen, labels, strict=True):
        by_type.setdefault(label, []).append(result)
    return Report(
        about=about,
        duration_s=duration_s,
        offered_rps=_rate(len(results_seen), _offered_s(results_seen)),
        throughput_rps=_rate(len(done), duration_s),
        input_tokens_per_s=_rate(sum(result.input_tokens for result in done), duration_s),
        output_tokens_per_s=_rate(sum(result.output_tokens for result in results_seen), duration_s),
        overall=_type_report(results_seen, all_targets, duration_s),
        types={
            label: _type_report(group, all_targets, duration_s)
            for label, group in sorted(by_type.items())
        },
        errors=dict(Counter(result.error_code for result in failed).most_common()),
        error_examples={result.error_code: result.error_message for result in reversed(failed)},
        refused_locally=sum(result.error_code == results.NOT_SENT for result in failed),
        unsent=0 if planned is None else planned - len(results_seen),
        resends=sum(result.resends for result in results_seen),
        in_flight_max=in_flight_max,
        replicas=dict(
            sorted(Counter(result.replica_id for result in done if result.replica_id).items())
        ),
        slo_targets=all_targets,
        lag_ms=spread_ms(
            max(0.0, result.sent_s - result.scheduled_s)  # timers may fire a little early
            for result in results_seen
            if result.sent_s is not None
        ),
        overhead_ms=spread_ms(
            result.overhead_ms / 1000.0 for result in done if result.overhead_ms is not None
        ),
        timeline=timeline(results_seen, labels, duration_s=duration_s),
    )


def spread_ms(seconds: Iterable[float]) -> Spread | None:
    """The distribution of ``seconds``, in milliseconds; None without samples."""
    values = np.fromiter(seconds, dtype=np.float64) * 1000.0
    if values.size == 0:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return Spread(
        count=int(values.size),
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p99=p99,
        max=float(values.max()),
    )


def type_labels(results_seen: Sequence[RequestResult]) -> list[str]:
    """Each result's type: its label, or where it has none, its lengths against the means."""
    if all(result.label for result in results_seen):
        return [result.label for result in results_seen]
    input_split = _geometric_mean([result.input_tokens for result in results_seen])
    output_split = _geometric_mean([result.output_tokens_asked for result in results_seen])
    return [
        result.label
        or (
            f"{'short' if result.input_tokens <= input_split else 'long'}-in/"
            f"{'short' if result.output_tokens_asked <= output_split else 'long'}-out"
        )
        for result in results_seen
    ]


def _geometric_mean(tokens: Sequence[int]) -> float:
    return math.exp(sum(math.log(max(1, count)) for count in tokens) / len(tokens))


def _type_report(
    group: Sequence[RequestResult], targets: Mapping[SloClass, SloTarget], duration_s: float
) -> TypeReport:
    done = [result for result in group if result.completed]
    good = sum(
        meets(targets[result.slo_class], ttft_s=result.ttft_s, tpot_s=result.tpot_s)
        for result in done
    )
    return TypeReport(
        offered=len(group),
        completed=len(done),
        failed=len(group) - len(done),
        input_tokens=sum(result.input_tokens for result in done),
        output_tokens=sum(result.output_tokens for result in group),
        slo_attainment=good / len(group) if group else None,
        goodput_rps=_rate(good, duration_s),
        ttft_ms=spread_ms(result.ttft_s for result in done if result.ttft_s is not None),
        tpot_ms=spread_ms(tpot for result in done if (tpot := result.tpot_s) is not None),
        itl_ms=spread_ms(gap for result in done for gap in np.diff(result.chunk_times_s)),
        e2e_ms=spread_ms(result.e2e_s for result in done if result.e2e_s is not None),
    )


def _duration_s(results_seen: Sequence[RequestResult]) -> float:
    ends = [ended_s for result in results_seen if (ended_s := result.ended_s) is not None]
    return max(ends, default=_offered_s(results_seen))


def _offered_s(results_seen: Sequence[RequestResult]) -> float:
    return max((result.scheduled_s for result in results_seen), default=0.0)


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
