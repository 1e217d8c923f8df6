"""``oserve plan``: the plan that the scheduler would make, and why, without a mesh."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType

from loadgen.compare.options import parse_class, parse_traces
from loadgen.planning.answer import Answer
from loadgen.planning.demand import Expected
from loadgen.planning.demand_file import models_named, read_demand
from loadgen.planning.demand_trace import WINDOW_S, Window, trace_demand
from loadgen.planning.machine import Site, read_site, serving
from loadgen.planning.plan_file import read_plan, write_plan
from loadgen.planning.planner import NOTHING
from loadgen.planning.report import Question, Report, report
from loadgen.planning.table import figures, plan_tables
from loadgen.planning.table_explain import compared, explained
from loadgen.planning.view import view
from loadgen.planning.what_if import parse_what_if
from loadgen.stdout import reserved_stdout
from services.scheduler.demands import RATE_MAX, RATE_MIN
from shared.config import SECTIONS
from shared.errors import ConfigInvalid, OServeError
from shared.toml_place import located

EXIT_FAILED, EXIT_USAGE = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asks, as it was written."""

    topology: Path
    model: str
    demand: Path | None
    traces: tuple[str, ...]
    at_s: float | None
    length_s: float | None
    scale: float
    in_force: Path | None
    what_ifs: tuple[str, ...]
    slo_class: str
    explain: bool
    sets: tuple[str, ...]

    def checked(self) -> None:
        """Raises ConfigInvalid unless it names one demand."""
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
        if self.length_s is not None and not self.traces:
            raise ConfigInvalid(
                field="--for", value=self.length_s, remedy="it is of a --trace: leave it"
            )
        if not 0.0 < self.scale < float("inf"):
            raise ConfigInvalid(field="--scale", value=self.scale, remedy="use a number above 0")

    def question(self) -> Question:
        """What it means; raises OServeError."""
        self.checked()
        site, expected = self._read()
        expected = expected.scaled(self.scale)
        rates = [kind.arrivals_rps for model in expected.models for kind in model.types]
        if not RATE_MIN <= min(rates) <= max(rates) <= RATE_MAX:
            remedy = f"the rates of all types have to be {RATE_MIN:g} to {RATE_MAX:g} requests/s"
            raise ConfigInvalid(field="--scale", value=self.scale, remedy=remedy)
        return Question(
            site=site,
            expected=expected,
            topology=str(self.topology),
            in_force=NOTHING if self.in_force is None else read_plan(self.in_force),
            what_ifs=tuple(parse_what_if(text) for text in self.what_ifs),
            explain=self.explain,
        )

    def _read(self) -> tuple[Site, Expected]:
        """The machines, and what is expected of them."""
        changed = [text.partition("=")[0] for text in self.sets]
        with located(self.topology, sections=SECTIONS, but=changed):
            site = read_site(self.topology, sets=self.sets)
            if self.demand is None:
                return self._traced(site)
            site = self._serving(site, models_named(self.demand))
            meant = self.model or site.mesh.model.model_id
            usual = parse_class(self.slo_class)
            return site, read_demand(self.demand, model_id=meant, slo_class=usual)

    def _traced(self, site: Site) -> tuple[Site, Expected]:
        paths = parse_traces(self.traces)
        site = self._serving(site, tuple(paths))
        window = Window(
            at_s=self.at_s or 0.0,
            length_s=WINDOW_S if self.length_s is None else self.length_s,
            slo_class=parse_class(self.slo_class),
        )
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


def run(asked: Asked, *, out: Path | None, as_json: bool) -> int:
    """Answer, and write the plan to ``out``; returns the exit code."""
    console = Console(stderr=True)
    try:
        question = asked.question()
        with console.status("planning"), reserved_stdout():
            found = report(question)
        if out is not None and found.answer.plan is not None:
            write_plan(found.answer.plan, out, comments=comments(found.answer))
    except OServeError as error:
        console.print(f"oserve plan: {error}", style="red", markup=False)
        return EXIT_USAGE if isinstance(error, ConfigInvalid) else EXIT_FAILED
    if as_json:
        sys.stdout.write(msgspec.json.encode(view(found)).decode() + "\n")
    else:
        _show(found, Console(), explain=asked.explain)
    if out is not None:
        written = found.answer.plan is not None
        what = f"written: {out}" if written else f"not written, since there is no plan: {out}"
        console.print(what, markup=False, highlight=False)
    return 0 if found.answer.feasible else EXIT_FAILED


def comments(answer: Answer) -> list[str]:
    """The head of a plan file: what the plan was made for, and what it should be worth."""
    lines = [f"Planned for {answer.demand}", f"on {answer.gpus} ({answer.topology})"]
    if answer.decision.chosen is not None:
        lines.append(f"{answer.decision.chosen.plan}: {figures(answer.decision.chosen)}")
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
