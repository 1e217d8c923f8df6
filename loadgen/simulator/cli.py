"""``oserve simulate``: what a trace would have done to a mesh, in one command, without a GPU."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from loadgen.compare.asked import demand_of, mesh_of, workload_of
from loadgen.compare.metrics import Latency, RunMetrics, measure
from loadgen.compare.options import parse_class, parse_forecast, parse_traces
from loadgen.compare.targets import class_targets
from loadgen.compare.workload import TypeMean, Workload, arrivals, typed_windows
from loadgen.report_table import milliseconds, share
from loadgen.simulator.deployments import Site, begun
from loadgen.simulator.incidents import parse_incident
from loadgen.simulator.policies import Begin, Policy, names, policy_named
from loadgen.simulator.run import SimulationSpec, run
from loadgen.stdout import reserved_stdout
from shared.errors import ConfigInvalid, OServeError
from shared.toml_place import located

_EXIT_FAILED, _EXIT_USAGE = 1, 2
IN_HINDSIGHT: tuple[Begin, ...] = ("best", "best-p99")

Traces = Annotated[
    list[str], typer.Argument(metavar="TRACE...", help="A trace, or MODEL=TRACE for each model.")
]
Topology = Annotated[Path, typer.Option("--topology", "-t", help="The mesh (TOML).")]
Model = Annotated[
    str, typer.Option(help="Of one TRACE: this cost profile's model, in place of the topology's.")
]
PolicyName = Annotated[str, typer.Option("--policy", help=f"One of: {', '.join(names())}.")]
Duration = Annotated[float | None, typer.Option(help="Seconds of it. [default: all]")]
RateScale = Annotated[
    float, typer.Option(help="Below 1 drop requests at random, above 1 add copies.")
]
SlowWork = Annotated[
    float | None,
    typer.Option(min=0.0, help="Virtual seconds of each solve. [default: as measured]"),
]
Incidents = Annotated[
    list[str] | None,
    typer.Option(
        "--incident",
        metavar="KIND:NODE@START+SECONDS",
        help="crash, stall, partition or slow; NODE is a GPU or a service. Repeatable.",
    ),
]
OutputLimit = Annotated[
    int | None,
    typer.Option(min=1, help="What clients allow as output. [default: just what they will get]"),
]


def simulate(  # noqa: PLR0913, PLR0917  # one parameter per option of the command line
    traces: Traces,
    topology: Topology,
    model: Model = "",
    policy: PolicyName = "static",
    start: Annotated[float, typer.Option(help="Begin at this second of the trace.")] = 0.0,
    duration: Duration = None,
    rate_scale: RateScale = 1.0,
    seed: Annotated[int, typer.Option(help="Of thinning, and of the simulator.")] = 0,
    forecast: Annotated[
        str | None, typer.Option(help="ours, last or oracle. [default: the policy's own]")
    ] = None,
    slo_class: Annotated[
        str, typer.Option("--class", help="Of requests whose trace names none.")
    ] = "standard",
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds for open requests to end in.")
    ] = 600.0,
    network_ms: Annotated[
        float, typer.Option(min=0.0, help="A message's way between services.")
    ] = 0.3,
    output_limit: OutputLimit = None,
    slow_work: SlowWork = None,
    incident: Incidents = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON.")] = False,
) -> None:
    """Run a trace through a simulated mesh of the production cores; say what it felt like."""
    console = Console(stderr=True)
    try:
        paths = parse_traces(traces)
        with located(topology, sections=("mesh",)):
            mesh = mesh_of(topology, model, paths)
            site = Site(mesh)
        wanted = policy_named(policy)
        workload = workload_of(
            paths, mesh, start_s=start, duration_s=duration, slo_class=parse_class(slo_class)
        )
        spec = SimulationSpec(
            mesh=begun(
                site, wanted, demand_of(_types(workload), workload.window_s, rate_scale=rate_scale)
            ),
            traffic=arrivals(workload, rate_scale=rate_scale, seed=seed),
            policy=wanted,
            forecast=parse_forecast(forecast) or wanted.forecast,
            seed=seed,
            network_s=network_ms / 1000.0,
            drain_s=drain,
            slow_work_s=slow_work,
            output_tokens_limit=output_limit,
            incidents=tuple(parse_incident(text, mesh) for text in incident or ()),
        )
        if wanted.begin in IN_HINDSIGHT:
            console.print(
                f"{wanted.name} begins with the topology's replicas: which are best in hindsight "
                "is found by `oserve compare`",
                markup=False,
            )
        with reserved_stdout():
            metrics = simulated(spec, workload)
    except OServeError as error:
        console.print(f"oserve simulate: {error}", style="red", markup=False)
        code = _EXIT_USAGE if isinstance(error, ConfigInvalid) else _EXIT_FAILED
        raise typer.Exit(code) from None
    if as_json:
        sys.stdout.write(msgspec.json.encode(metrics).decode() + "\n")
    else:
        _show(metrics, wanted, Console())


def simulated(spec: SimulationSpec, workload: Workload) -> RunMetrics:
    """The figures of one run; every request counts."""
    targets = class_targets(_types(workload))
    return measure(run(spec), window_s=workload.window_s, warmup_s=0.0, targets=targets)


def _types(workload: Workload) -> list[TypeMean]:
    return [kind for typed in typed_windows(workload) for kind in typed.types]


def _show(metrics: RunMetrics, policy: Policy, console: Console) -> None:
    summary = Table(title=f"Simulated: {policy.name}", show_header=False, title_justify="left")
    summary.add_column(style="bold")
    summary.add_column()
    rows = {
        "requests": f"{metrics.offered:,} offered, {metrics.completed:,} completed",
        "throughput": f"{metrics.throughput_rps:.2f} requests/s; "
        f"{metrics.output_tokens_per_s:,.0f} output, {metrics.input_tokens_per_s:,.0f} input "
        "tokens/s",
        "goodput": f"{metrics.goodput_rps:.2f} requests/s; "
        f"SLO attainment {share(metrics.slo_attainment)} of those offered",
        "GPUs": f"{metrics.gpu_hours:.2f} GPU-hours, {metrics.switches} switches "
        f"({metrics.switches_failed} failed) in {metrics.switch_s:.1f} s, "
        f"{metrics.preemptions:,} preemptions",
        "simulator": f"{metrics.cpu_s:.1f} s of CPU, {metrics.peak_rss_bytes / 2**20:.0f} MiB, "
        f"{metrics.events:,} events, {metrics.engine_steps:,} engine steps",
        "digest": metrics.digest,
    }
    for name, text in rows.items():
        summary.add_row(name, text)
    console.print(summary)
    console.print(_latencies(metrics))
    for moment in metrics.moments:
        verdict = "" if moment.succeeded else " FAILED"
        console.print(
            f"{moment.at_s:9.1f} s  {moment.plan} in {moment.took_s:.1f} s{verdict}: "
            f"{moment.reason}",
            markup=False,
            highlight=False,
        )
    for note in metrics.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)


def _latencies(metrics: RunMetrics) -> Table:
    table = Table(title="Latency, ms", title_justify="left")
    for heading in ("", "p50", "p90", "p99"):
        table.add_column(heading, justify="left" if not heading else "right")
    spreads: dict[str, Latency] = {
        "TTFT": metrics.ttft_ms, "TPOT": metrics.tpot_ms, "E2E": metrics.e2e_ms,
    }  # fmt: skip
    for name, spread in spreads.items():
        table.add_row(
            name, *(milliseconds(value) for value in (spread.p50, spread.p90, spread.p99))
        )
    return table
