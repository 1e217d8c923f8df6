"""How true the simulator is: ``python -m loadgen.bench.bench_fidelity``.

The same arrivals go to a mesh of real processes whose engines are modelled and run in real time,
and to the simulator with the same topology. For TTFT, TPOT and E2E it prints mean and p99 of both,
and how far the simulator is off: a JSON line, and a table on stderr. ``bench_torch_fidelity`` does
the same with a real engine.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from loadgen import client
from loadgen.bench.environment import environment
from loadgen.bench.rig import Rig
from loadgen.client import ClientOptions
from loadgen.results import RequestResult
from loadgen.simulator.outcome import Requests
from loadgen.simulator.policies import policy_named
from loadgen.simulator.run import SimulationSpec, Traffic, run
from loadgen.workload.arrivals import Selection, select
from loadgen.workload.readers import read_trace
from loadgen.workload.records import TraceRecord
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.models import ModelSpec

TRACES = Path(os.environ.get("OSERVE_TRACES", "../shared/traces"))
TRACE = "azure2023_code_conv.csv.gz"
SETTLE_S = 3.0
READY_S = 180.0  # big models load for more than a minute, in real time
Floats = npt.NDArray[np.float64]
STATISTICS: dict[str, Callable[[Floats], float]] = {
    "mean": lambda seconds: float(np.mean(seconds)),
    "p99": lambda seconds: float(np.quantile(seconds, 0.99)),
}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds, one row per completed request, in order of arrival."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats


def seen_by_clients(results: list[RequestResult]) -> Latencies:
    failed = [result.error_code for result in results if result.error_code]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(results)} requests failed: {set(failed)}")
    ttft_s = np.array([result.ttft_s or 0.0 for result in results])
    e2e_s = np.array([result.e2e_s or 0.0 for result in results])
    tokens = np.array([result.output_tokens for result in results])
    return Latencies(ttft_s, _tpot_s(ttft_s, e2e_s, tokens), e2e_s)


def simulated(requests: Requests) -> Latencies:
    if not requests.completed.all():
        raise SystemExit(f"{int((~requests.completed).sum())} simulated requests did not complete")
    return Latencies(
        requests.ttft_s,
        _tpot_s(requests.ttft_s, requests.e2e_s, requests.output_tokens),
        requests.e2e_s,
    )


def _tpot_s(ttft_s: Floats, e2e_s: Floats, tokens: npt.NDArray[Any]) -> Floats:
    several = tokens > 1
    return (e2e_s[several] - ttft_s[several]) / (tokens[several] - 1)


def compared(real: Latencies, simulation: Latencies) -> dict[str, Any]:
    """Mean and p99 of both in milliseconds, and the simulator's relative error in percent."""
    figures: dict[str, Any] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        measured, predicted = getattr(real, name), getattr(simulation, name)
        for statistic, of in STATISTICS.items():
            a, b = of(measured), of(predicted)
            figures[f"{name.removesuffix('_s')}_{statistic}"] = {
                "real_ms": round(1e3 * a, 2),
                "simulated_ms": round(1e3 * b, 2),
                "error_percent": round(100.0 * (b / a - 1.0), 2),
            }
    return figures


def real_time(mesh: MeshConfig, records: list[TraceRecord]) -> Latencies:
    """Replay the records against a mesh of real processes."""
    with Rig(mesh=mesh, pinned=False, log_requests=False, ready_timeout_s=READY_S) as rig:
        options = ClientOptions(url=rig.url, model=mesh.model.model_id)

        async def replay() -> list[RequestResult]:
            await asyncio.sleep(SETTLE_S)
            return await client.replay(records, options, progress=client.Progress())

        return seen_by_clients(asyncio.run(replay()))


def virtual_time(mesh: MeshConfig, records: list[TraceRecord], network_s: float) -> Latencies:
    spec = SimulationSpec(
        mesh=mesh,
        traffic=(Traffic(model_id=mesh.model.model_id, records=records),),
        policy=policy_named("static"),
        network_s=network_s,
    )
    return simulated(run(spec).requests)


def big_cluster() -> MeshConfig:
    """Four tp4 replicas of Llama-2-70B on sixteen H100s."""
    return MeshConfig(
        name="fidelity",
        model=ModelSpec(model_id="llama-2-70b", context_tokens_max=16384),
        engine=EngineSpec(kind="modelled", modelled=ModelledEngineSettings(timing="profile")),
        nodes=tuple(NodeSpec(node_id=f"n{i}", gpus=8, gpu_kind="h100") for i in range(2)),
        replicas=tuple(ReplicaWish(replica_id=f"r{i}", parallelism="tp4") for i in range(4)),
    )


def measure_modelled(arguments: argparse.Namespace) -> dict[str, Any]:
    mesh = big_cluster()
    selection = Selection(duration_s=arguments.seconds, rate_scale=arguments.rate_scale)
    records = select(read_trace(TRACES / TRACE), selection)
    real = real_time(mesh, records)
    return {
        "requests": len(records),
        "seconds": arguments.seconds,
        "network_s": arguments.network_s,
        "latency": compared(real, virtual_time(mesh, records, arguments.network_s)),
    }


def show(name: str, latency: Mapping[str, Mapping[str, float]]) -> None:
    sys.stderr.write(f"{name:<12} {'real ms':>12} {'simulated ms':>14} {'error %':>9}\n")
    for row, figures in latency.items():
        sys.stderr.write(
            f"{row:<12} {figures['real_ms']:>12.2f} {figures['simulated_ms']:>14.2f} "
            f"{figures['error_percent']:>+9.2f}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_fidelity")
    parser.add_argument("--seconds", type=float, default=180.0, help="of the trace")
    parser.add_argument("--rate-scale", type=float, default=0.5)
    parser.add_argument("--network-s", type=float, default=0.0006)
    arguments = parser.parse_args()
    if not (TRACES / TRACE).exists():
        sys.stderr.write(f"bench_fidelity: skipped, no {TRACE} in {TRACES} (OSERVE_TRACES)\n")
        return 0
    figures = measure_modelled(arguments)
    show("modelled", figures["latency"])
    line: dict[str, Any] = {"benchmark": "fidelity_modelled", **figures}
    line["environment"] = msgspec.to_builtins(environment())
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
