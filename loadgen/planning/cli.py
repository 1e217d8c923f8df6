"""``oserve plan``: the plan that the scheduler would make, and why, without a mesh."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType

from loadgen.compare.options import parse_class, parse_traces
from loadgen.planning.demand import Expected
from loadgen.planning.demand_file import models_named, read_demand
from loadgen.planning.demand_trace import WINDOW_S, Window, trace_demand
from loadgen.planning.machine import Site, read_site, serving
from loadgen.planning.plan_file import read_plan, write_plan
from loadgen.planning.planner import NOTHING, Answer
from loadgen.planning.report import Question, Report, report
from loadgen.planning.table import plan_tables, worth
from loadgen.planning.table_explain import compared, explained
from loadgen.planning.view import view
from loadgen.planning.what_if import parse_what_if
from loadgen.stdout import reserved_stdout
from shared.config import SECTIONS
from shared.errors import ConfigInvalid, OServeError
from shared.slo import SloClass
from shared.toml_place import located

_EXIT_FAILED, _EXIT_USAGE = 1, 2

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
For = Annotated[float, typer.Option("--for", metavar="SECONDS", help="How much of the trace.")]
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
    length: For = WINDOW_S,
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
    console = Console(stderr=True)
    try:
        asked = Asked(
            topology=topology,
            model=model,
            demand=demand,
            traces=tuple(trace or ()),
            at_s=at,
            length_s=length,
            scale=scale,
            slo_class=parse_class(slo_class),
        ).checked()
        site, expected = asked.read(override or ())
        question = Question(
            site=site,
            expected=expected,
            topology=str(topology),
            in_force=NOTHING if in_force is None else read_plan(in_force),
            what_ifs=tuple(parse_what_if(text) for text in what_if or ()),
            explain=explain,
        )
        with console.status("planning"), reserved_stdout():
            found = report(question)
        if out is not None and found.answer.plan is not None:
            write_plan(found.answer.plan, out, comments=comments(found.answer))
    except OServeError as error:
        console.print(f"oserve plan: {error}", style="red", markup=False)
        code = _EXIT_USAGE if isinstance(error, ConfigInvalid) else _EXIT_FAILED
        raise typer.Exit(code) from None
    if as_json:
        sys.stdout.write(msgspec.json.encode(view(found)).decode() + "\n")
    else:
        _show(found, Console(), explain=explain)
    if out is not None:
        written = found.answer.plan is not None
        what = f"written: {out}" if written else f"not written, since there is no plan: {out}"
        console.print(what, markup=False, highlight=False)
    if not found.answer.feasible:
        raise typer.Exit(_EXIT_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says of demand and machines."""

    topology: Path
    model: str
    demand: Path | None
    traces: tuple[str, ...]
    at_s: float | None
    length_s: float
    scale: float
    slo_class: SloClass

    def checked(self) -> "Asked":
        """Self, if it names one demand; raises ConfigInvalid."""
        if (self.demand is None) == (not self.traces):
            given = "both" if self.traces else "neither"
            raise ConfigInvalid(
                field="--demand",
                value=given,
                remedy="give --demand FILE, or --trace TRACE with --at SECONDS",
            )
        if (self.at_s is None) == bool(self.traces):
            remedy = "say --at SECONDS" if self.traces else "it is the time in a --trace: leave it"
            raise ConfigInvalid(field="--at", value=self.at_s, remedy=remedy)
        if not 0.0 < self.scale < float("inf"):
            raise ConfigInvalid(field="--scale", value=self.scale, remedy="use a number above 0")
        return self

    def read(self, sets: Sequence[str]) -> tuple[Site, Expected]:
        """The machines, and what is expected of them; raises OServeError."""
        with located(
            self.topology, sections=SECTIONS, but=[text.partition("=")[0] for text in sets]
        ):
            site = read_site(self.topology, sets=sets)
            if self.demand is not None:
                site = self._serving(site, models_named(self.demand))
                first = site.mesh.model.model_id
                expected = read_demand(
                    self.demand, model_id=self.model or first, slo_class=self.slo_class
                )
            else:
                site, expected = self._traced(site)
        return site, expected.scaled(self.scale)

    def _traced(self, site: Site) -> tuple[Site, Expected]:
        paths = parse_traces(self.traces)
        site = self._serving(site, tuple(paths))
        window = Window(at_s=self.at_s or 0.0, length_s=self.length_s, slo_class=self.slo_class)
        named = {name or self.model or site.mesh.model.model_id: p for name, p in paths.items()}
        return site, trace_demand(named, site.mesh, window.checked())

    def _serving(self, site: Site, names: Sequence[str]) -> Site:
        """``names``: the models that the demand names, "" for the one that is meant."""
        if self.model and set(names) - {"", self.model}:
            raise ConfigInvalid(
                field="--model",
                value=self.model,
                remedy=f"the demand names {', '.join(filter(None, names))}: leave it out",
            )
        first = self.model or site.mesh.model.model_id
        return serving(site, [name or first for name in names], alone=bool(self.model))


def comments(answer: Answer) -> list[str]:
    """The head of a plan file: what the plan was made for, and what it should be worth."""
    lines = [f"Planned for {answer.demand}", f"on {answer.gpus} ({answer.topology})"]
    if answer.decision.chosen is not None:
        lines.append(f"{answer.decision.chosen.plan}: {worth(answer.decision.chosen)}")
    for kind in answer.decision.types:
        name = answer.type_name(kind.model_id, kind.request_type)
        named = "" if name == kind.request_type else f" ({name})"
        lines.append(
            f"type {kind.request_type}{named} of {kind.model_id}: {kind.arrivals_rps:.4g} "
            f"requests/s of {kind.input_tokens:,.0f} tokens in, {kind.output_tokens:,.0f} out"
        )
    return [*lines, "A running mesh numbers its types itself: `oserve why plan` tells how.", ""]


def _show(found: Report, console: Console, *, explain: bool) -> None:
    parts: list[RenderableType] = [plan_tables(found.answer)]
    parts += explained(found) if explain else []
    parts += compared(found) if found.what_ifs else []
    console.print(Group(*parts))
