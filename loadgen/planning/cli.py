"""The command line of ``oserve plan``. What it means is worked out in ``command.py``, which loads
solvers: help does not."""

from pathlib import Path
from typing import Annotated

import typer

Topology = Annotated[Path, typer.Option("--topology", "-t", help="The mesh (TOML).")]
Model = Annotated[
    str, typer.Option(help="Plan for this one alone; also for what the topology lacks.")
]
Demand = Annotated[
    Path | None, typer.Option("--demand", help="What is expected, as TOML: see README.md.")
]
Traces = Annotated[
    list[str] | None,
    typer.Option("--trace", metavar="TRACE", help="Or a trace; MODEL=TRACE for each model."),
]
At = Annotated[
    float | None, typer.Option("--at", metavar="SECONDS", help="Where in the trace to begin.")
]
For = Annotated[
    float | None,
    typer.Option("--for", metavar="SECONDS", help="How much of the trace. [default: 300]"),
]
Scale = Annotated[float, typer.Option(help="Times the demand's rates.")]
InForce = Annotated[
    Path | None, typer.Option("--plan", help="A plan file: what stands. [default: nothing]")
]
WhatIfs = Annotated[
    list[str] | None,
    typer.Option(
        "--what-if",
        metavar="KEY=VALUE,...",
        help="Plan again with other hardware: gpus, add, kind, nodes, network_gbps, scale. "
        "Repeatable.",
    ),
]
ClassName = Annotated[str, typer.Option("--class", help="Of requests that name none.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Why this plan, and what more hardware would bring.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write the plan to this file (TOML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Such as scheduler.survive=1 or scheduler.elastic=true; scheduler.target.ttft_s goes "
        "with scheduler.target.tpot_s. Repeatable.",
    ),
]


def plan(  # noqa: PLR0913, PLR0917  # one parameter per option of the command line
    topology: Topology,
    model: Model = "",
    demand: Demand = None,
    trace: Traces = None,
    at: At = None,
    length: For = None,
    scale: Scale = 1.0,
    in_force: InForce = None,
    what_if: WhatIfs = None,
    slo_class: ClassName = "standard",
    explain: Explain = False,
    out: Out = None,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON.")] = False,
) -> None:
    """Plan replicas and routing weights for a demand, as the scheduler would."""
    from loadgen.planning.command import Asked, run  # noqa: PLC0415  # loads solvers

    asked = Asked(
        topology=topology,
        model=model,
        demand=demand,
        traces=tuple(trace or ()),
        at_s=at,
        length_s=length,
        scale=scale,
        in_force=in_force,
        what_ifs=tuple(what_if or ()),
        slo_class=slo_class,
        explain=explain,
        sets=tuple(override or ()),
    )
    raise typer.Exit(run(asked, out=out, as_json=as_json))
