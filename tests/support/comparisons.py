"""Made-up results of simulations, to compare."""

from collections.abc import Mapping, Sequence

import numpy as np

from loadgen.bench.environment import Environment
from loadgen.compare.jobs import FORMAT, RunRecord
from loadgen.compare.metrics import QUANTILES, Latency, Moment, RunMetrics, TypeMetrics
from loadgen.compare.outcome import About, Comparison, PolicyText, Runs, cells_of
from loadgen.compare.saturation import Saturation
from loadgen.compare.words import findings
from loadgen.simulator.outcome import Requests, SimulationResult, Switch
from shared.slo import DEFAULT_TARGETS

STANDARD = DEFAULT_TARGETS["standard"]
ENVIRONMENT = Environment(
    commit="abc", cpu="made up", cores=2, memory_bytes=1, python="CPython 3.11", system="Linux"
)


def result_of(  # columns
    arrived_s: Sequence[float],
    ttft_s: Sequence[float],
    e2e_s: Sequence[float],
    input_tokens: Sequence[int],
    output_tokens: Sequence[int],
    *,
    labels: Sequence[str] | None = None,
    switches: tuple[Switch, ...] = (),
) -> SimulationResult:
    """NaN in ``e2e_s``: did not end."""
    kinds = list(labels or ["chat"] * len(arrived_s))
    names = tuple(sorted(set(kinds)))
    requests = Requests(
        model=np.zeros(len(arrived_s), dtype=np.int16),
        arrived_s=np.array(arrived_s, dtype=np.float64),
        ttft_s=np.array(ttft_s, dtype=np.float64),
        e2e_s=np.array(e2e_s, dtype=np.float64),
        input_tokens=np.array(input_tokens, dtype=np.int32),
        output_tokens=np.array(output_tokens, dtype=np.int32),
        completed=~np.isnan(np.array(e2e_s, dtype=np.float64)),
        label=np.array([names.index(kind) for kind in kinds], dtype=np.int16),
        models=("m",),
        labels=names,
    )
    return SimulationResult(
        requests=requests,
        duration_s=100.0,
        switches=switches,
        gpu_seconds=7200.0,
        events=1,
        engine_steps=2,
        preemptions=3,
        wall_s=0.5,
        cpu_s=0.4,
        peak_rss_bytes=5,
        digest="d",
    )


def metrics_of(
    goodput_rps: float, *, e2e_ms_p99: float | None = 900.0, gpu_hours: float = 4.0
) -> RunMetrics:
    """One run; what is not given is the same in each."""
    curve = tuple(10.0 * (place + 1) for place in range(len(QUANTILES)))
    latency = Latency(count=100, p50=100.0, p90=500.0, p99=800.0, curve=curve)
    return RunMetrics(
        offered=100,
        completed=100,
        completed_share=1.0,
        slo_attainment=0.9,
        goodput_rps=goodput_rps,
        throughput_rps=10.0,
        input_tokens_per_s=1000.0,
        output_tokens_per_s=100.0,
        ttft_ms=latency,
        tpot_ms=latency,
        e2e_ms=Latency(count=100, p50=100.0, p90=500.0, p99=e2e_ms_p99, curve=curve),
        gpu_hours=gpu_hours,
        switches=1,
        switches_failed=0,
        reweightings=2,
        switch_s=5.0,
        preemptions=0,
        settled_s=1.0,
        types={
            "m/chat": TypeMetrics(
                offered=100, completed=100, met=90, target=STANDARD,
                ttft_ms_p99=800.0, tpot_ms_p99=800.0, e2e_ms_p99=e2e_ms_p99,
            )
        },
        moments=(Moment(at_s=20.0, took_s=5.0, succeeded=True, plan="1 tp2, 2 tp1"),),
    )  # fmt: skip


def records_of(runs: Sequence[RunMetrics]) -> list[RunRecord]:
    return [
        RunRecord(
            format=FORMAT, digest=str(seed), name="", rate_scale=1.0, seed=seed, metrics=metrics
        )
        for seed, metrics in enumerate(runs, 1)
    ]


def comparison_of(
    runs: Mapping[tuple[str, float], Sequence[RunMetrics]], *, reference: str
) -> Comparison:
    """``runs`` by policy and load."""
    groups = [
        Runs(policy, load, "4 tp1", records_of(found)) for (policy, load), found in runs.items()
    ]
    cells = cells_of(groups, reference)
    return Comparison(
        about=About(
            command="oserve compare t.csv", started_unix_s=0.0, took_s=1.0, oserve_version="0",
            packages={"numpy": "2"}, environment=ENVIRONMENT, topology="t.toml", gpus={"h100": 4},
            traces={"m": "t.csv"}, trace_digests={"m": "d"}, offered_requests={"m": 100},
            prompts_cut={"m": 0}, window_s=100.0, warmup_s=10.0, settings={"seeds": 3},
            runs_done=1, runs_reused=0, source_digest="s",
        ),
        saturation=Saturation(
            rate_scale=2.0, rate_scale_above=2.02, deployment="4 tp1", requests_per_s=20.0,
            simulated_s=100.0, from_s=0.0, simulations=9,
        ),
        reference=reference,
        policies=tuple(
            PolicyText(
                name=name, forecast="ours", known=f"known of {name}", inferred=f"guess of {name}",
                switches=name.startswith("oserve"),
            )
            for name in dict.fromkeys(policy for policy, _ in runs)
        ),
        deployments=("4 tp1", "2 tp2"),
        targets={"m/chat": STANDARD},
        cells=cells,
        findings=findings(cells),
    )  # fmt: skip
