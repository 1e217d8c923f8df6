"""A comparison as tables for a terminal: one for each load, then the findings."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.compare.outcome import BY_NAME, Cell, Comparison
from loadgen.compare.words import LOSES, NOTHING, number, ratio_words, with_interval
from loadgen.report_table import milliseconds

_LOSSES_MAX = 20
_COLOURS = {"better": "green", "worse": "red"}
_RESOURCES = {
    "throughput_rps": "requests/s",
    "completed_share": "completed",
    "gpu_hours": "GPU-hours",
    "switches": "switches",
    "switch_s": "switching s",
}


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Values are means over the seeds; brackets hold 95 % intervals."""
    parts: list[RenderableType] = [_latency_note(comparison)]
    for load in comparison.loads:
        cells = [cell for cell in comparison.cells if cell.load == load]
        parts += [_service(cells), _resources(cells)]
    parts.append(_findings(comparison))
    return Group(*parts)


def _latency_note(comparison: Comparison) -> Text:
    saturation = comparison.saturation
    how = "as given" if saturation.given else f"of {saturation.deployment}"
    return Text(
        f"Load 1.0 is saturation {how}: rate scale {saturation.rate_scale:.4g}, "
        f"{saturation.requests_per_s:.3g} requests/s. Ratios are to {comparison.reference}, run by "
        "run, brackets hold 95 % intervals. Everything here is simulated."
    )


def _service(cells: Sequence[Cell]) -> Table:
    """Percentiles one below the other: side by side they do not fit on 80 columns."""
    seeds = len(cells[0].seeds)
    table = Table(
        title=f"Load {cells[0].load:g} ({seeds} seed{'s' if seeds > 1 else ''})",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("policy, begin", overflow="fold", min_width=14)
    table.add_column("goodput, SLO met", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title in ("TTFT", "TPOT", "E2E ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        name = Text(cell.policy, style="bold")
        name.append(f"\n{cell.deployment}", style="not bold")
        latencies = (
            "\n".join(_milliseconds(cell, f"{kind}_ms_{share}") for share in ("p50", "p90", "p99"))
            for kind in ("ttft", "tpot", "e2e")
        )
        rows = (Text(text) for text in ("p50\np90\np99", *latencies))
        table.add_row(name, _good(cell), *rows, end_section=True)
    return table


def _good(cell: Cell) -> Text:
    text = Text(with_interval(cell.values["goodput_rps"], "requests/s") + "\n")
    pair = next((pair for pair in cell.versus if pair.metric == "goodput_rps"), None)
    if pair is None:
        text.append("reference\n")
    else:
        verdict = f"{ratio_words(pair.ratio)} {pair.verdict}\n"
        text.append(verdict, style=_COLOURS.get(pair.verdict, ""))
    return text.append(with_interval(cell.values["slo_attainment"], "share"))


def _milliseconds(cell: Cell, name: str) -> str:
    value = cell.values[name]
    return "never" if value is None else milliseconds(value.mean)


def _resources(cells: Sequence[Cell]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", overflow="fold", min_width=14)
    for title in _RESOURCES.values():
        table.add_column(title, justify="right")
    for cell in cells:
        values = (
            NOTHING if (value := cell.values[name]) is None
            else number(value.mean, BY_NAME[name].unit)
            for name in _RESOURCES
        )  # fmt: skip
        table.add_row(Text(cell.policy), *(Text(value) for value in values))
    return table


def _findings(comparison: Comparison) -> Text:
    """Losses in full; the rest is in the report."""
    losses = [finding for finding in comparison.findings if LOSES in finding]
    shown = losses[:_LOSSES_MAX] or comparison.findings[:1]
    text = Text()
    for finding in shown:
        text.append(f"{finding}\n", style="red" if LOSES in finding else "")
    if len(comparison.findings) > len(shown):
        text.append(f"{len(comparison.findings) - len(shown)} more findings are in report.md.")
    return text
