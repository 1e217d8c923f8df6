"""How fast the simulator is: ``python -m loadgen.bench.bench_simulator``.

CPU seconds and memory of whole runs, each in a process of its own: the Azure 2023 hour on eight
replicas, ten days of ServeGen's m-large pool on 32 GPUs, and the hour at several rates with a line
through CPU seconds against requests, which shows what a request costs and that nothing grows
faster. The policy is ``static``: what is measured is the serving of requests. Prints one JSON line
each.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

import msgspec
import numpy as np

from loadgen.bench.environment import environment
from loadgen.simulator.policies import policy_named
from loadgen.simulator.run import SimulationSpec, Traffic, run
from loadgen.workload.arrivals import Selection, select
from loadgen.workload.readers import read_trace
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.models import ModelSpec

TRACES = Path(os.environ.get("OSERVE_TRACES", "../shared/traces"))
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    trace: str
    model: str
    nodes: int
    gpus_per_node: int
    shape: str
    replicas: int
    rate_scale: float = 1.0


HOUR = Case(
    trace="azure2023_code_conv.csv.gz",
    model="llama-3.1-8b",
    nodes=1,
    gpus_per_node=8,
    shape="tp1",
    replicas=8,
)
TEN_DAYS = Case(
    trace="servegen_m-large_days0-10.csv.gz",
    model="llama-2-70b",
    nodes=4,
    gpus_per_node=8,
    shape="tp4",
    replicas=8,
)
CASES = {
    "azure_hour": HOUR,
    "ten_days": TEN_DAYS,
    **{
        f"azure_hour_x{scale:g}": msgspec.structs.replace(HOUR, rate_scale=scale)
        for scale in SCALES
    },
}


def mesh_of(case: Case) -> MeshConfig:
    return MeshConfig(
        name="bench",
        model=ModelSpec(model_id=case.model, context_tokens_max=131_072),
        engine=EngineSpec(kind="modelled", modelled=ModelledEngineSettings(timing="profile")),
        nodes=tuple(
            NodeSpec(node_id=f"n{i}", gpus=case.gpus_per_node, gpu_kind="h100")
            for i in range(case.nodes)
        ),
        replicas=tuple(
            ReplicaWish(replica_id=f"r{i}", parallelism=case.shape) for i in range(case.replicas)
        ),
    )


def measure(case: Case) -> dict[str, Any]:
    records = select(read_trace(TRACES / case.trace), Selection(rate_scale=case.rate_scale))
    result = run(
        SimulationSpec(
            mesh=mesh_of(case),
            traffic=(Traffic(model_id=case.model, records=records),),
            policy=policy_named("static"),
        )
    )
    requests = len(records)
    return {
        "requests": requests,
        "completed": int(result.requests.completed.sum()),
        "cpu_s": round(result.cpu_s, 2),
        "cpu_us_per_request": round(1e6 * result.cpu_s / requests, 1),
        "requests_per_cpu_s": round(requests / result.cpu_s),
        "simulated_s": round(result.duration_s),
        "events": result.events,
        "engine_steps": result.engine_steps,
        "peak_rss_mib": round(result.peak_rss_bytes / 2**20, 1),
        "ttft_ms_p50": round(1e3 * float(np.nanmedian(result.requests.ttft_s)), 2),
        "digest": result.digest,
    }


def in_process_of_its_own(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadgen.bench.bench_simulator", "--case", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=dict[str, Any])


def line_through(points: list[tuple[float, float]]) -> dict[str, float]:
    """Least squares: CPU seconds = start + slope * requests, and how much of it a line explains."""
    requests, cpu_s = zip(*points, strict=True)
    slope, start = linear_regression(requests, cpu_s)
    return {
        "start_s": round(start, 3),
        "us_per_request": round(1e6 * slope, 1),
        "r_squared": round(correlation(requests, cpu_s) ** 2, 5),
    }


def emit(name: str, figures: dict[str, Any]) -> None:
    line = {"benchmark": name, **figures, "environment": msgspec.to_builtins(environment())}
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_simulator")
    parser.add_argument("--case", choices=sorted(CASES), help="one case, its figures alone")
    parser.add_argument("--skip-ten-days", action="store_true")
    arguments = parser.parse_args()
    if arguments.case:
        sys.stdout.write(msgspec.json.encode(measure(CASES[arguments.case])).decode() + "\n")
        return 0
    if not (TRACES / HOUR.trace).exists():
        sys.stderr.write(f"bench_simulator: skipped, no {HOUR.trace} in {TRACES} (OSERVE_TRACES)\n")
        return 0
    emit("simulator_azure_hour", in_process_of_its_own("azure_hour"))
    if not arguments.skip_ten_days:
        emit("simulator_ten_days", in_process_of_its_own("ten_days"))
    points: list[tuple[float, float]] = []
    for scale in SCALES:
        figures = in_process_of_its_own(f"azure_hour_x{scale:g}")
        points.append((figures["requests"], figures["cpu_s"]))
    emit("simulator_linear", {"requests_and_cpu_s": points, **line_through(points)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
