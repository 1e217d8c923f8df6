"""A comparison as data: what was compared, what came of it, and who was better than whom."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from loadgen.bench.environment import Environment
from loadgen.compare.jobs import RunRecord
from loadgen.compare.metrics import RunMetrics
from loadgen.compare.saturation import Saturation
from loadgen.compare.statistics import Estimate, estimate, paired_difference, paired_ratio
from shared.slo import SloTarget

FORMAT = 1
"""Raised when a field of the JSON changes its meaning."""
OURS = "oserve"


@dataclass(frozen=True, slots=True)
class Metric:
    """``more_is_better``: None where neither is."""

    name: str
    title: str
    unit: str
    of: Callable[[RunMetrics], float | None]
    more_is_better: bool | None


METRICS: tuple[Metric, ...] = (
    Metric("goodput_rps", "goodput", "requests/s", lambda m: m.goodput_rps, True),
    Metric("slo_attainment", "SLO attainment", "share", lambda m: m.slo_attainment, True),
    Metric("ttft_ms_p50", "TTFT P50", "ms", lambda m: m.ttft_ms.p50, False),
    Metric("ttft_ms_p90", "TTFT P90", "ms", lambda m: m.ttft_ms.p90, False),
    Metric("ttft_ms_p99", "TTFT P99", "ms", lambda m: m.ttft_ms.p99, False),
    Metric("tpot_ms_p50", "TPOT P50", "ms", lambda m: m.tpot_ms.p50, False),
    Metric("tpot_ms_p90", "TPOT P90", "ms", lambda m: m.tpot_ms.p90, False),
    Metric("tpot_ms_p99", "TPOT P99", "ms", lambda m: m.tpot_ms.p99, False),
    Metric("e2e_ms_p50", "E2E P50", "ms", lambda m: m.e2e_ms.p50, False),
    Metric("e2e_ms_p90", "E2E P90", "ms", lambda m: m.e2e_ms.p90, False),
    Metric("e2e_ms_p99", "E2E P99", "ms", lambda m: m.e2e_ms.p99, False),
    Metric("throughput_rps", "throughput", "requests/s", lambda m: m.throughput_rps, True),
    Metric("output_tokens_per_s", "output", "tokens/s", lambda m: m.output_tokens_per_s, True),
    Metric("input_tokens_per_s", "input", "tokens/s", lambda m: m.input_tokens_per_s, True),
    Metric("gpu_hours", "GPU-hours", "h", lambda m: m.gpu_hours, False),
    Metric("completed_share", "completed", "share", lambda m: m.completed_share, True),
    Metric("switches", "switches", "", lambda m: float(m.switches), None),
    Metric("reweightings", "reweightings", "", lambda m: float(m.reweightings), None),
    Metric("switch_s", "switch time", "s", lambda m: m.switch_s, None),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
DECISIVE = ("goodput_rps", "slo_attainment", "ttft_ms_p99", "tpot_ms_p99", "e2e_ms_p99",
            "throughput_rps", "gpu_hours")  # fmt: skip
"""On which the report says who wins."""


class Versus(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of a policy against another's, run by run. ``verdict``: "better" or "worse" if the
    interval of the ratio leaves out 1 (where a value is 0, that of the difference 0; or one of them
    never ended in any run, the other always), "even" if not, "unknown" for a single run or where
    some values are missing."""

    metric: str
    difference: Estimate | None
    ratio: Estimate | None
    verdict: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load. ``values``: by metric, the mean over the seeds; None where a run has
    none (a percentile that never ended). ``versus``: against the reference."""

    policy: str
    load: float
    rate_scale: float
    deployment: str  # with which it began
    seeds: tuple[int, ...]
    values: dict[str, Estimate | None]
    versus: tuple[Versus, ...]
    runs: tuple[RunMetrics, ...]


class PolicyText(msgspec.Struct, frozen=True, kw_only=True):
    """``switches``: whether it may change the plan."""

    name: str
    forecast: str
    known: str
    inferred: str
    switches: bool


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to do it again. ``traces``: model to file; ``settings``: every option."""

    command: str
    started_unix_s: float
    took_s: float
    oserve_version: str
    packages: dict[str, str]
    environment: Environment
    topology: str
    gpus: dict[str, int]
    traces: dict[str, str]
    trace_digests: dict[str, str]
    offered_requests: dict[str, int]  # of the window at rate scale 1
    prompts_cut: dict[str, int]
    window_s: float
    warmup_s: float
    settings: dict[str, str | int | float | bool | None]
    runs_done: int
    runs_reused: int
    source_digest: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    about: About
    saturation: Saturation
    reference: str
    policies: tuple[PolicyText, ...]
    deployments: tuple[str, ...]  # the static ones looked at in hindsight
    targets: dict[str, SloTarget]  # by model/type
    cells: tuple[Cell, ...]
    findings: tuple[str, ...] = ()

    def cell(self, policy: str, load: float) -> Cell:
        return next(c for c in self.cells if (c.policy, c.load) == (policy, load))

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(cell.load for cell in self.cells))


@dataclass(frozen=True, slots=True)
class Runs:
    """The records of one policy at one load, in the order of the seeds."""

    policy: str
    load: float
    deployment: str
    records: Sequence[RunRecord]


def cells_of(groups: Sequence[Runs], reference: str) -> tuple[Cell, ...]:
    """Means and comparisons; ``reference`` must be among the policies at every load."""
    by_key = {(group.policy, group.load): group for group in groups}
    return tuple(_cell(group, by_key[reference, group.load]) for group in groups)


def versus(metric: Metric, runs: Sequence[RunMetrics], others: Sequence[RunMetrics]) -> Versus:
    values, references = [metric.of(run) for run in runs], [metric.of(run) for run in others]
    difference, ratio = paired_difference(values, references), paired_ratio(values, references)
    if difference is None and len(values) > 1 and metric.more_is_better is False:
        verdict = _endless_verdict(values, references)
    elif ratio is None:
        verdict = _verdict(metric, difference, neutral=0.0)
    else:
        verdict = _verdict(metric, ratio, neutral=1.0)
    return Versus(metric=metric.name, difference=difference, ratio=ratio, verdict=verdict)


def _cell(group: Runs, reference: Runs) -> Cell:
    metrics = [record.metrics for record in group.records]
    others = [record.metrics for record in reference.records]
    same = group.policy == reference.policy
    return Cell(
        policy=group.policy,
        load=group.load,
        rate_scale=group.records[0].rate_scale,
        deployment=group.deployment,
        seeds=tuple(record.seed for record in group.records),
        values={metric.name: estimate([metric.of(m) for m in metrics]) for metric in METRICS},
        versus=() if same else tuple(versus(metric, metrics, others) for metric in METRICS),
        runs=tuple(metrics),
    )


def _verdict(metric: Metric, found: Estimate | None, *, neutral: float) -> str:
    if found is None or found.low is None or found.high is None:
        return "unknown"
    if metric.more_is_better is None or found.low <= neutral <= found.high:
        return "even"
    return "better" if (found.mean > neutral) == metric.more_is_better else "worse"


def _endless_verdict(values: Sequence[float | None], references: Sequence[float | None]) -> str:
    """A percentile that never ended is worse than any that did, where it is so in each pair."""
    if all(value is None for value in values) and None not in references:
        return "worse"
    if all(value is None for value in references) and None not in values:
        return "better"
    return "unknown"
