"""All policies on the Azure 2023 hour, sixteen H100s: ``python -m loadgen.bench.bench_compare``.

``oserve compare`` with Llama-2-70B and with OPT-66B: every policy, the same arrivals, load as a
share of what the best uniform deployment in hindsight can bear. Prints one JSON line for each model
and policy; the whole reports, with pictures, go to ``--out``. Finished runs there are kept, so that
an interrupted benchmark goes on where it was. All of it is simulated.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from loadgen.bench.environment import environment
from loadgen.compare.assemble import compared, write_outputs
from loadgen.compare.jobs import Runs
from loadgen.compare.options import Options, parse_loads
from loadgen.compare.outcome import Comparison
from loadgen.stdout import reserved_stdout
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.models import ModelSpec

TRACES = Path(os.environ.get("OSERVE_TRACES", "../shared/traces"))
TRACE = "azure2023_code_conv.csv.gz"
MODELS = ("llama-2-70b", "opt-66b")
POLICIES = (
    "static-best", "static-best-p99", "static-default", "uniform-reload", "uniform-fast",
    "llumnix", "dynamo", "oserve-paper", "oserve-paper@last", "oserve", "oserve@oracle",
)  # fmt: skip
SHOWN = (
    "goodput_rps", "slo_attainment", "ttft_ms_p99", "tpot_ms_p99", "e2e_ms_p99",
    "completed_share", "gpu_hours", "switches", "switch_s",
)  # fmt: skip


def mesh_of(model: str) -> MeshConfig:
    """Queues without a bound to speak of: a policy that is too slow shows it as latency."""
    settings = ModelledEngineSettings(timing="profile", waiting_max=100_000)
    return MeshConfig(
        name="h100x16",
        model=ModelSpec(model_id=model, context_tokens_max=16_384),
        engine=EngineSpec(kind="modelled", modelled=settings),
        nodes=tuple(NodeSpec(node_id=f"n{i}", gpus=8, gpu_kind="h100") for i in range(2)),
    )


def compare(model: str, arguments: argparse.Namespace) -> Comparison:
    options = Options(
        traces={"": str(TRACES / TRACE)},
        policies=POLICIES,
        loads=parse_loads(arguments.load),
        seeds=arguments.seeds,
        reference="static-best",
        duration_s=arguments.duration,
        slo_times=arguments.slo_times,
        saturation_s=900.0,
        slow_work_s=None,
        candidates=6,
    ).checked()
    folder = arguments.out / model
    outcome = compared(
        options,
        mesh_of(model),
        runs=Runs(folder / "runs", processes=arguments.jobs),
        topology="two nodes of eight h100",
        command="python -m loadgen.bench.bench_compare",
    )
    write_outputs(outcome, folder)
    return outcome


def lines_of(model: str, outcome: Comparison) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for cell in outcome.cells:
        values = {name: cell.values.get(name) for name in SHOWN}
        versus = {v.metric: v.verdict for v in cell.versus if v.metric in SHOWN}
        lines.append(
            {
                "benchmark": "compare",
                "model": model,
                "policy": cell.policy,
                "load": cell.load,
                "rate_scale": round(cell.rate_scale, 4),
                "began_with": cell.deployment,
                **{k: None if v is None else round(v.mean, 4) for k, v in values.items()},
                "versus_static_best": versus,
            }
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_compare")
    parser.add_argument("--load", default="0.5,0.8")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--duration", type=float, default=None, help="seconds of the hour")
    parser.add_argument("--slo-times", type=float, default=None, help="of the latencies at rest")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path(".oserve/compare"))
    parser.add_argument("--model", choices=MODELS, action="append")
    arguments = parser.parse_args()
    if not (TRACES / TRACE).exists():
        sys.stderr.write(f"bench_compare: skipped, no {TRACE} in {TRACES} (OSERVE_TRACES)\n")
        return 0
    where = msgspec.to_builtins(environment())
    for model in arguments.model or MODELS:
        with reserved_stdout():
            outcome = compare(model, arguments)
        for line in lines_of(model, outcome):
            line["environment"] = where
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        for finding in outcome.findings:
            sys.stderr.write(f"{model}: {finding}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
