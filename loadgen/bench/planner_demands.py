"""What planners are measured on: random demands, and demands as public traces bring them."""

import random
from collections.abc import Sequence
from itertools import islice
from math import exp, log1p
from pathlib import Path

from loadgen.workload.readers import read_trace
from loadgen.workload.records import TraceRecord
from services.profiler.config import ProfilerConfig
from services.profiler.kmeans import OnlineKMeans, Point
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from shared.cost.limits import EngineLimits
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.slo import DEFAULT_TARGETS

MODEL, KIND, NODE_GPUS = "llama-3.1-70b", "h100", 8
TRACE_FILES = (
    "azure2023_code_conv.csv.gz",
    "mooncake_conversation.jsonl.gz",
    "servegen_m-large_days0-10.csv.gz",
)
WINDOW_REQUESTS = 1000
RECORDS_MAX = 100_000  # of each trace: its first day or more
SAMPLE_MAX = 256  # requests behind the centres of types: seeding takes their number squared
HORIZON_S = 60.0


def random_demand(types: int, rng: random.Random) -> tuple[TypeForecast, ...]:
    """Lengths log-uniform from 55 to 4,900 tokens in and from 12 to 900 out; rates of the same
    order."""
    return tuple(
        TypeForecast(
            request_type=number,
            arrivals_rps=rng.uniform(0.2, 2.0),
            input_tokens_mean=exp(rng.uniform(4.0, 8.5)),
            output_tokens_mean=exp(rng.uniform(2.5, 6.8)),
        )
        for number in range(types)
    )


class TraceDemands:
    """Windows of the traces in ``folder``, taken in turn from each, evenly over its length."""

    def __init__(self, folder: Path) -> None:
        self.missing = tuple(name for name in TRACE_FILES if not (folder / name).is_file())
        self._windows = [_windows(folder / name) for name in TRACE_FILES if not self.missing]

    def take(self, count: int, types: int) -> list[tuple[TypeForecast, ...]]:
        """``count`` demands of up to ``types`` types, fewer where requests differ little; none
        when a trace is missing."""
        taken: list[tuple[TypeForecast, ...]] = []
        for number in range(count if self._windows else 0):
            windows = self._windows[number % len(self._windows)]
            rounds = -(-count // len(self._windows))
            at = number // len(self._windows) * len(windows) // rounds
            taken.append(typed(windows[at], types))
        return taken


def typed(records: Sequence[TraceRecord], types: int) -> tuple[TypeForecast, ...]:
    """Types as the profiler makes its first ones, by k-means on log lengths from a sample; each
    request counts for the nearest centre."""
    config = ProfilerConfig()
    means = OnlineKMeans(
        size=types,
        memory=config.memory_requests,
        refine_ln=config.refine_ln,
        refine_samples=config.refine_samples,
        coarsen_ln=config.coarsen_ln,
    )
    means.seed([_point(record) for record in records[:: -(-len(records) // SAMPLE_MAX)]])
    groups: dict[int, list[TraceRecord]] = {}
    for record in records:
        groups.setdefault(means.nearest(_point(record))[0], []).append(record)
    lasts_s = max(1e-3, records[-1].timestamp_s - records[0].timestamp_s)
    return tuple(
        TypeForecast(
            request_type=number,
            arrivals_rps=len(group) / lasts_s,
            input_tokens_mean=sum(record.input_tokens for record in group) / len(group),
            output_tokens_mean=sum(record.output_tokens for record in group) / len(group),
        )
        for number, group in sorted(groups.items())
    )


def problem(gpus: int, demand: Sequence[TypeForecast], *, scale: float, limit_s: float) -> Problem:
    """``gpus`` on nodes of eight, nothing in force, and ``scale`` times the demand."""
    offers = tuple(
        GpuOffer(gpu_id=f"g{i:04d}", node_id=f"n{i // NODE_GPUS}", kind=KIND) for i in range(gpus)
    )
    types = tuple(
        TypeForecast(
            request_type=kind.request_type,
            arrivals_rps=scale * kind.arrivals_rps,
            input_tokens_mean=kind.input_tokens_mean,
            output_tokens_mean=kind.output_tokens_mean,
        )
        for kind in demand
    )
    return Problem(
        now_s=0.0,
        epoch=1,
        models=(ModelDemand(model_id=MODEL, horizon_s=HORIZON_S, types=types),),
        offers=offers,
        in_force=DeploymentPlan(plan_id="none"),
        kinds={offer.gpu_id: offer.kind for offer in offers},
        profiles={MODEL: MODEL},
        targets={MODEL: DEFAULT_TARGETS["standard"]},
        limits=EngineLimits(),
        time_limit_s=limit_s,
    )


def _windows(path: Path) -> list[list[TraceRecord]]:
    """Runs of ``WINDOW_REQUESTS`` consecutive requests."""
    records = list(islice(read_trace(path), RECORDS_MAX))
    starts = range(0, len(records) - WINDOW_REQUESTS + 1, WINDOW_REQUESTS)
    return [records[start : start + WINDOW_REQUESTS] for start in starts]


def _point(record: TraceRecord) -> Point:
    return log1p(record.input_tokens), log1p(record.output_tokens)
