"""What one run came to. Definitions, so that numbers can be compared with others':

- Counted are the requests that arrive after the warm-up and before the window's end.
- TTFT, E2E: arrival to first token, to last token. TPOT: mean time per output token after the
  first; a request with one output token has none.
- A request that did not end within the drain time counts as endless: a percentile that falls on
  one is None, never the percentile of the lucky rest. Percentiles are order statistics (the
  smallest value that at least that share of the requests does not exceed).
- ``slo_attainment``: the share of counted requests that completed and met TTFT and TPOT of their
  type. ``goodput_rps``: how many did, over the window's seconds after the warm-up.
- ``throughput_rps``, ``input_tokens_per_s``, ``output_tokens_per_s``: completed requests, and
  tokens of them, over the time from the warm-up's end to the window's end, or to the last
  completion if that is later.
- ``settled_s``: when requests with 99 % of the offered tokens (input and output) had ended, after
  the window's end; below 0 if before it, None if never. What saturation is told by.
- ``gpu_hours``: of the whole run, warm-up and drain included.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from loadgen.simulator.outcome import Requests, SimulationResult, Switch
from shared.slo import SloTarget

Floats = npt.NDArray[np.float64]
SETTLED_SHARE = 0.99
QUANTILES = tuple(round(i / 100, 2) for i in range(1, 101))
"""Of the distributions kept for pictures."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution in milliseconds. None: that percentile never ended."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    curve: tuple[float | None, ...] = ()  # at QUANTILES


class TypeMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One type of one model: ``target`` is what its requests had to meet."""

    offered: int
    completed: int
    met: int
    target: SloTarget
    ttft_ms_p99: float | None
    tpot_ms_p99: float | None
    e2e_ms_p99: float | None


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the plan in force, in words. ``moved``: of its replicas, not of shares alone."""

    at_s: float
    took_s: float
    succeeded: bool
    plan: str
    moved: bool = True
    reason: str = ""


class RunMetrics(msgspec.Struct, frozen=True, kw_only=True):
    offered: int
    completed: int
    completed_share: float
    slo_attainment: float
    goodput_rps: float
    throughput_rps: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: Latency
    tpot_ms: Latency
    e2e_ms: Latency
    gpu_hours: float
    switches: int  # changes of the plan in force that moved replicas
    switches_failed: int
    reweightings: int  # changes of shares alone
    switch_s: float  # all switches together, from adoption to the new plan in force
    preemptions: int
    settled_s: float | None
    types: dict[str, TypeMetrics]
    moments: tuple[Moment, ...] = ()
    events: int = 0
    engine_steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    digest: str = ""
    notes: tuple[str, ...] = ()


def type_key(model_id: str, label: str) -> str:
    """How targets and types are named: ``model/label``."""
    return f"{model_id}/{label}"


def measure(
    result: SimulationResult,
    *,
    window_s: float,
    warmup_s: float,
    targets: Mapping[str, SloTarget],
) -> RunMetrics:
    """The figures of one run. ``targets`` holds one for each ``type_key`` of the requests."""
    counted = _counted(result.requests, warmup_s)
    ended_s = counted.arrived_s + counted.e2e_s
    tpot_s = tpot_of(counted)
    keys, numbers = _types(counted)
    met = _met(counted, tpot_s, [targets[key] for key in keys], numbers)
    done = counted.completed
    span_s = max(window_s, float(np.max(ended_s, initial=0.0, where=done))) - warmup_s
    moments = tuple(_moments(result.switches))
    offered = int(counted.arrived_s.size)
    return RunMetrics(
        offered=offered,
        completed=int(done.sum()),
        completed_share=_share(int(done.sum()), offered),
        slo_attainment=_share(int(met.sum()), offered),
        goodput_rps=float(met.sum()) / (window_s - warmup_s),
        throughput_rps=float(done.sum()) / span_s,
        input_tokens_per_s=float(counted.input_tokens[done].sum()) / span_s,
        output_tokens_per_s=float(counted.output_tokens[done].sum()) / span_s,
        ttft_ms=latency(_endless(counted.ttft_s, done)),
        tpot_ms=latency(_endless(tpot_s, done)[(counted.output_tokens > 1) | ~done]),
        e2e_ms=latency(_endless(counted.e2e_s, done)),
        gpu_hours=result.gpu_seconds / 3600.0,
        switches=sum(moment.succeeded and moment.moved for moment in moments),
        switches_failed=sum(not moment.succeeded for moment in moments),
        reweightings=sum(moment.succeeded and not moment.moved for moment in moments),
        switch_s=math.fsum(s.took_s for s in result.switches),
        preemptions=result.preemptions,
        settled_s=_settled_s(counted, ended_s, window_s),
        types=_type_metrics(counted, tpot_s, met, keys, numbers, targets),
        moments=moments,
        events=result.events,
        engine_steps=result.engine_steps,
        wall_s=result.wall_s,
        cpu_s=result.cpu_s,
        peak_rss_bytes=result.peak_rss_bytes,
        digest=result.digest,
        notes=result.notes,
    )


def _moments(switches: Sequence[Switch]) -> Iterator[Moment]:
    for switch in switches:
        yield Moment(
            at_s=switch.at_s,
            took_s=switch.took_s,
            succeeded=switch.succeeded,
            plan=switch.plan,
            moved=switch.moved,
            reason=switch.reason,
        )


def latency(seconds: Floats) -> Latency:
    """The distribution of ``seconds``, of which some may be infinite."""
    if seconds.size == 0:
        return Latency(count=0, p50=None, p90=None, p99=None)
    ordered = np.sort(seconds)
    return Latency(
        count=int(seconds.size),
        p50=_order_ms(ordered, 0.50),
        p90=_order_ms(ordered, 0.90),
        p99=_order_ms(ordered, 0.99),
        curve=tuple(_order_ms(ordered, share) for share in QUANTILES),
    )


def tpot_of(requests: Requests) -> Floats:
    """Seconds per output token after the first; NaN for a request with fewer than two."""
    gaps = requests.output_tokens - 1
    spread_s = np.maximum(requests.e2e_s - requests.ttft_s, 0.0)
    nowhere: Floats = np.full(spread_s.shape, np.nan)
    return np.divide(spread_s, gaps, out=nowhere, where=gaps > 0)


def _settled_s(requests: Requests, ended_s: Floats, window_s: float) -> float | None:
    tokens: Floats = (requests.input_tokens + requests.output_tokens).astype(np.float64)
    ends_s = _endless(ended_s, requests.completed)
    order = np.argsort(ends_s, kind="stable")
    done: Floats = np.cumsum(tokens[order])
    ordered: Floats = ends_s[order]
    if done.size == 0:
        return None
    enough = SETTLED_SHARE * float(done[-1]) * (1.0 - 1e-12)
    at_s = float(ordered[int(np.searchsorted(done, enough))])
    return at_s - window_s if math.isfinite(at_s) else None


def _order_ms(ordered: Floats, share: float) -> float | None:
    place = max(0, math.ceil(share * ordered.size - 1e-9) - 1)
    value = float(ordered[place])
    return round(1000.0 * value, 4) if math.isfinite(value) else None


def _counted(requests: Requests, warmup_s: float) -> Requests:
    keep = requests.arrived_s >= warmup_s
    return Requests(
        model=requests.model[keep],
        arrived_s=requests.arrived_s[keep],
        ttft_s=requests.ttft_s[keep],
        e2e_s=requests.e2e_s[keep],
        input_tokens=requests.input_tokens[keep],
        output_tokens=requests.output_tokens[keep],
        completed=requests.completed[keep],
        label=requests.label[keep],
        models=requests.models,
        labels=requests.labels,
    )


def _endless(seconds: Floats, done: npt.NDArray[np.bool_]) -> Floats:
    return np.where(done, seconds, np.inf)


def _types(requests: Requests) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The keys of the types that occur, and each request's place among them."""
    pairs = requests.model.astype(np.int64) * (len(requests.labels) + 1) + requests.label
    codes, numbers = np.unique(pairs, return_inverse=True)
    keys = [
        type_key(
            requests.models[int(code) // (len(requests.labels) + 1)],
            requests.labels[int(code) % (len(requests.labels) + 1)],
        )
        for code in codes
    ]
    return keys, numbers.reshape(-1).astype(np.int64)


def _met(
    requests: Requests, tpot_s: Floats, targets: list[SloTarget], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which requests met their targets (see shared.slo.meets), all at once."""
    ttft_max = np.array([target.ttft_s for target in targets], dtype=np.float64)[numbers]
    tpot_max = np.array([target.tpot_s for target in targets], dtype=np.float64)[numbers]
    in_time = requests.completed & (requests.ttft_s <= ttft_max)
    return in_time & (np.isnan(tpot_s) | (tpot_s <= tpot_max))


def _type_metrics(
    requests: Requests,
    tpot_s: Floats,
    met: npt.NDArray[np.bool_],
    keys: list[str],
    numbers: npt.NDArray[np.int64],
    targets: Mapping[str, SloTarget],
) -> dict[str, TypeMetrics]:
    metrics: dict[str, TypeMetrics] = {}
    for number, key in enumerate(keys):
        rows = numbers == number
        done = requests.completed[rows]
        several = (requests.output_tokens[rows] > 1) | ~done
        metrics[key] = TypeMetrics(
            offered=int(rows.sum()),
            completed=int(done.sum()),
            met=int(met[rows].sum()),
            target=targets[key],
            ttft_ms_p99=latency(_endless(requests.ttft_s[rows], done)).p99,
            tpot_ms_p99=latency(_endless(tpot_s[rows], done)[several]).p99,
            e2e_ms_p99=latency(_endless(requests.e2e_s[rows], done)).p99,
        )
    return metrics


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
