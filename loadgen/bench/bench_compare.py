"""The study of policies: ``python -m loadgen.bench.bench_compare``; all of it is simulated.

Workloads x models x GPUs x loads x policies, on the same arrivals, load as a share of what the best
static deployment in hindsight can bear. Prints one JSON line for each cell and policy, then one for
each policy against others, by workload and over all. Every finished run is kept under ``--out``:
interrupted, the same command goes on where it was. ``--markdown`` writes the tables.

``--part`` says how much of it is done, where options do not: a small part, the reduced matrix
(every workload, sixteen GPUs, two loads, a third of the hour), or all.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from loadgen.bench.compare_cells import Row, Setting, rows
from loadgen.bench.compare_summary import markdown, summary
from loadgen.bench.compare_workloads import WORKLOADS, StudyWorkload, Unavailable
from loadgen.bench.environment import environment
from loadgen.compare.jobs import Runs, source_digest
from loadgen.compare.options import parse_loads, parse_names
from loadgen.stdout import reserved_stdout
from shared.errors import OServeError

MODELS = ("llama-2-70b", "opt-66b")
GPUS = (16, 32)
POLICIES = (
    "static-best", "static-best-p99", "static-default", "uniform-reload", "uniform-fast",
    "llumnix", "dynamo", "melange", "exhaustive", "oserve-paper@oracle", "oserve-paper@last",
    "oserve@oracle", "oserve@last", "oserve-fast@oracle", "oserve-fast@last", "oserve-elastic@last",
)  # fmt: skip
PARTS: Mapping[str, Mapping[str, str | float]] = {
    "small": {
        "workload": "azure", "gpus": "16", "load": "0.6,0.9", "duration": 900.0, "warmup": 240.0,
        "policies": "static-best,static-default,uniform-reload,oserve-paper@oracle,"
        "oserve@oracle,oserve@last",
    },
    "reduced": {
        "workload": ",".join(WORKLOADS), "gpus": "16", "load": "0.6,0.9", "duration": 1200.0,
        "warmup": 240.0,
        "policies": "static-best,static-default,uniform-reload,uniform-fast,llumnix,"
        "oserve-paper@oracle,oserve-paper@last,oserve@oracle,oserve@last,oserve-fast@oracle,"
        "oserve-elastic@last",
    },
    "all": {
        "workload": ",".join(WORKLOADS), "gpus": ",".join(map(str, GPUS)), "load": "0.5:1.1:0.1",
        "duration": 3600.0, "warmup": 300.0, "policies": ",".join(POLICIES),
    },
}  # fmt: skip


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_compare")
    parser.add_argument("--part", choices=tuple(PARTS), default="small", help="of the study")
    parser.add_argument("--workload", help=f"comma-separated: {', '.join(WORKLOADS)}")
    parser.add_argument("--model", default=",".join(MODELS), help="of workloads that name none")
    parser.add_argument("--gpus", help="comma-separated numbers of H100s; three models have 32")
    parser.add_argument("--load", help="FIRST:LAST:STEP or A,B,C, as shares of saturation")
    parser.add_argument("--policies", help="comma-separated")
    parser.add_argument("--duration", type=float, help="seconds of each workload, warm-up included")
    parser.add_argument("--warmup", type=float, help="seconds that are not counted")
    parser.add_argument("--saturation", type=float, default=900.0, help="seconds searched with")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=6, help="static deployments looked at")
    parser.add_argument("--slo-times", type=float, default=None, help="of the latencies at rest")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path(".oserve/compare"))
    parser.add_argument("--markdown", type=Path, default=None, help="write the tables there")
    return parser


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """What is asked for, whole: options, else those of the part."""
    arguments = parser_of().parse_args(words)
    for name, value in PARTS[arguments.part].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def meshes(
    arguments: argparse.Namespace,
) -> Iterator[tuple[StudyWorkload, tuple[str, ...], int]]:
    """(workload, models, GPUs): a workload with models of its own has all of them at once, on the
    most GPUs of the study."""
    for name in parse_names(arguments.workload):
        if name not in WORKLOADS:
            parser_of().error(f"no workload {name!r}; there are: {', '.join(WORKLOADS)}")
        workload = WORKLOADS[name]
        if workload.models:
            yield workload, workload.models, max(GPUS)
            continue
        for model in parse_names(arguments.model):
            for gpus in parse_names(arguments.gpus):
                yield workload, (model,), int(gpus)


def main() -> int:
    arguments = arguments_of()
    setting = Setting(
        policies=parse_names(arguments.policies),
        loads=parse_loads(arguments.load),
        seeds=arguments.seeds,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
        saturation_s=arguments.saturation,
        candidates=arguments.candidates,
        slo_times=arguments.slo_times,
        cache=arguments.out / "traces",
    )
    runs = Runs(arguments.out / "runs", processes=arguments.jobs)
    told = {"environment": msgspec.to_builtins(environment()), "source": source_digest()}
    found: list[Row] = []
    failures = 0
    for workload, models, gpus in meshes(arguments):
        where = f"{workload.name}, {'+'.join(models)}, {gpus} GPUs"
        try:
            for row in _reserved(rows(workload, models, gpus, setting, runs)):
                found.append(row)
                _say({"benchmark": "compare", **msgspec.to_builtins(row), **told})
        except Unavailable as reason:
            sys.stderr.write(f"bench_compare: {where} skipped: {reason}\n")
        except OServeError as error:
            failures += 1
            sys.stderr.write(f"bench_compare: {where} failed: {error}\n")
    for versus in summary(found):
        _say({"benchmark": "compare-summary", **msgspec.to_builtins(versus), **told})
    if arguments.markdown is not None and found:
        arguments.markdown.write_text(markdown(found), encoding="utf-8")
    sys.stderr.write(
        f"bench_compare: {runs.done} runs done in {runs.cpu_s:.0f} s of CPU, {runs.reused} reused\n"
    )
    return 1 if failures else 0


def _reserved(found: Iterator[Row]) -> Iterator[Row]:
    """``found``, while what libraries print goes to standard error."""
    while True:
        with reserved_stdout():
            row = next(found, None)
        if row is None:
            return
        yield row


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
