"""``oserve compare``: policies on the same traces in simulated meshes, and who was better."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Self

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadgen.compare.asked import mesh_of
from loadgen.compare.assemble import compared, write_outputs
from loadgen.compare.jobs import Runs
from loadgen.compare.options import (
    Options,
    parse_class,
    parse_forecast,
    parse_jobs,
    parse_loads,
    parse_names,
    parse_slo,
    parse_traces,
)
from loadgen.compare.table import comparison_tables
from loadgen.simulator.policies import names
from loadgen.simulator.site import Site
from loadgen.stdout import reserved_stdout
from shared.errors import ConfigInvalid, OServeError
from shared.toml_place import located

_EXIT_FAILED, _EXIT_USAGE = 1, 2
Traces = Annotated[
    list[str], typer.Argument(metavar="TRACE...", help="A trace, or MODEL=TRACE for each model.")
]
Topology = Annotated[Path, typer.Option("--topology", "-t", help="The mesh (TOML).")]
Model = Annotated[
    str, typer.Option(help="Of one TRACE: this model (or its profile) in place of the topology's.")
]
Policies = Annotated[
    str, typer.Option(help=f"Comma-separated: {', '.join(names())}, static-all, all.")
]
Load = Annotated[str, typer.Option(help="Shares of saturation: FIRST:LAST:STEP, or A,B,C.")]
Folder = Annotated[
    Path, typer.Option("--report", help="Folder for report, pictures, JSON, and finished runs.")
]
Slo = Annotated[str, typer.Option(help="class, or relative:N times the latencies at rest.")]
Given = Annotated[
    float | None, typer.Option(help="Rate scale of load 1.0, in place of searching for it.")
]
Searched = Annotated[
    float, typer.Option(help="Seconds of the window that the search simulates, the busiest.")
]
SlowWork = Annotated[
    float | None, typer.Option(help="Virtual seconds of each solve. [default: as measured]")
]

Reference = Annotated[
    str, typer.Option(help="Policy to compare with. [default: static-best, or the first]")
]
Warmup = Annotated[
    float | None, typer.Option(help="Seconds not counted. [default: a tenth, at most 300]")
]
ClassName = Annotated[str, typer.Option("--class", help="Of requests whose trace names none.")]
Forecast = Annotated[
    str | None, typer.Option(help="oracle, last or ours, where a name does not end in one.")
]
Candidates = Annotated[
    int, typer.Option(help="Static deployments to look at in hindsight, at most.")
]


def compare(  # noqa: PLR0913, PLR0917  # one parameter per option of the command line
    traces: Traces,
    topology: Topology,
    report: Folder,
    model: Model = "",
    policies: Policies = "static-best,static-default,oserve",
    load: Load = "0.5:1.1:0.1",
    seeds: Annotated[int, typer.Option(help="Runs of each policy at each load.")] = 5,
    reference: Reference = "",
    start: Annotated[float, typer.Option(help="Begin at this second of the trace.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of it. [default: all]")] = None,
    warmup: Warmup = None,
    drain: Annotated[float, typer.Option(help="Seconds for open requests to end in.")] = 600.0,
    slo: Slo = "class",
    slo_class: ClassName = "standard",
    forecast: Forecast = None,
    saturation: Given = None,
    saturation_duration: Searched = 3600.0,
    candidates: Candidates = 12,
    slow_work: SlowWork = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time, a process each.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON.")] = False,
) -> None:
    """Compare policies on the same arrivals at several loads. Interrupted, it goes on where it was
    when called again with the same folder."""
    console = Console(stderr=True)
    try:
        wanted = parse_names(policies)
        options = Options(
            traces=parse_traces(traces),
            policies=wanted,
            loads=parse_loads(load),
            seeds=seeds,
            reference=reference or _reference(wanted),
            start_s=start,
            duration_s=duration,
            warmup_s=warmup,
            drain_s=drain,
            slo_times=parse_slo(slo),
            slo_class=parse_class(slo_class),
            forecast=parse_forecast(forecast),
            saturation_scale=saturation,
            saturation_s=saturation_duration,
            candidates=candidates,
            slow_work_s=slow_work,
        ).checked()
        with located(topology, sections=("mesh",)):
            mesh = mesh_of(topology, model, options.traces)
            Site(mesh)  # says at once what cannot be served here
        runs = Runs(report / "runs", processes=parse_jobs(jobs))
        with reserved_stdout(), _Bar(console) as bar:
            runs.told = bar.tell
            outcome = compared(
                options, mesh, runs=runs, topology=str(topology), command=shlex.join(sys.argv)
            )
        written = write_outputs(outcome, report)
    except OServeError as error:
        console.print(f"oserve compare: {error}", style="red", markup=False)
        code = _EXIT_USAGE if isinstance(error, ConfigInvalid) else _EXIT_FAILED
        raise typer.Exit(code) from None
    if as_json:
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
        return
    Console().print(comparison_tables(outcome))
    for path in written:
        Console().print(f"written: {path}", markup=False)


def _reference(wanted: tuple[str, ...]) -> str:
    return "static-best" if {"static-best", "all"} & set(wanted) else wanted[0]


class _Bar:
    """A progress bar that shows the phase under way."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("reading traces", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total)
