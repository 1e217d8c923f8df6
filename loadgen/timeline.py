"""Load and latency over the time of a replay, in equal buckets: what the picture is drawn from."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from loadgen.results import RequestResult

BUCKETS_MAX = 60
_BUCKETS_MIN = 12
_REQUESTS_PER_BUCKET = 15  # fewer, and a line shows noise
_STEPS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Series of ``buckets`` values; bucket i covers [i, i + 1) times ``bucket_s``.

    Arrivals stand in the bucket in which they were due, completions, failures and tokens in that
    in which they happened, latencies in that in which the request was due. None: no request.
    """

    bucket_s: float
    buckets: int
    offered_rps: dict[str, list[float]]  # by type
    completed_rps: dict[str, list[float]]
    failed: list[int]
    output_tokens_per_s: list[float]
    ttft_ms_p50: list[float | None]
    ttft_ms_p99: list[float | None]
    e2e_ms_p50: list[float | None]
    e2e_ms_p99: list[float | None]


def timeline(
    results: Sequence[RequestResult], labels: Sequence[str], *, duration_s: float
) -> Timeline:
    """Buckets of a round length: at most ``BUCKETS_MAX``, fewer where requests are few."""
    bucket_s = bucket_length_s(duration_s, requests=len(results))
    buckets = max(1, math.floor(duration_s / bucket_s) + 1)
    kinds = sorted(set(labels))
    offered = {kind: np.zeros(buckets) for kind in kinds}
    completed = {kind: np.zeros(buckets) for kind in kinds}
    failed = np.zeros(buckets, dtype=np.int64)
    tokens = np.zeros(buckets)
    ttft_s: list[list[float]] = [[] for _ in range(buckets)]
    e2e_s: list[list[float]] = [[] for _ in range(buckets)]

    def at(time_s: float) -> int:
        return min(buckets - 1, max(0, int(time_s / bucket_s)))

    for result, kind in zip(results, labels, strict=True):
        due = at(result.scheduled_s)
        offered[kind][due] += 1
        ended = due if result.ended_s is None else at(result.ended_s)
        if result.completed:
            completed[kind][ended] += 1
            ttft_s[due].append(result.ttft_s or 0.0)
            e2e_s[due].append(result.e2e_s or 0.0)
        else:
            failed[ended] += 1
        if result.chunk_times_s:
            places = np.asarray(result.chunk_times_s) / bucket_s
            np.add.at(tokens, np.clip(places.astype(int), 0, buckets - 1), result.chunk_tokens)
    return Timeline(
        bucket_s=bucket_s,
        buckets=buckets,
        offered_rps={kind: _floats(series / bucket_s) for kind, series in offered.items()},
        completed_rps={kind: _floats(series / bucket_s) for kind, series in completed.items()},
        failed=[int(count) for count in failed],
        output_tokens_per_s=_floats(tokens / bucket_s),
        ttft_ms_p50=_percentiles_ms(ttft_s, 50),
        ttft_ms_p99=_percentiles_ms(ttft_s, 99),
        e2e_ms_p50=_percentiles_ms(e2e_s, 50),
        e2e_ms_p99=_percentiles_ms(e2e_s, 99),
    )


def bucket_length_s(duration_s: float, *, requests: int) -> float:
    """The shortest round length that gives neither too many buckets nor too empty ones."""
    buckets = min(BUCKETS_MAX, max(_BUCKETS_MIN, requests // _REQUESTS_PER_BUCKET))
    for step_s in _STEPS_S:
        if duration_s <= step_s * buckets:
            return step_s
    return math.ceil(duration_s / buckets / 3600.0) * 3600.0


def _floats(series: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> list[float]:
    return [float(value) for value in series]


def _percentiles_ms(buckets: list[list[float]], percent: float) -> list[float | None]:
    return [
        float(np.percentile(values, percent)) * 1000.0 if values else None for values in buckets
    ]
