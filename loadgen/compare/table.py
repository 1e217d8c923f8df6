"""A comparison as tables for a terminal: one for each load, then the findings."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.compare.outcome import BY_NAME, Cell, Comparison
from loadgen.compare.words import LOSES, NOTHING, number, ratio_words, with_interval
from loadgen.report_table import milliseconds

_LOSSES_MAX = 20
_COLOURS = {"better": "green", "worse": "red"}
_WITH_INTERVAL = ("goodput_rps", "slo_attainment")
_PLAIN = ("throughput_rps", "gpu_hours", "switches", "switch_s", "completed_share")


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Values are means over the seeds; brackets hold 95 % intervals."""
    parts: list[RenderableType] = [_latency_note(comparison)]
    parts += [_load_table(comparison, load) for load in comparison.loads]
    parts.append(_findings(comparison))
    return Group(*parts)


def _latency_note(comparison: Comparison) -> Text:
    saturation = comparison.saturation
    how = "as given" if saturation.given else f"of {saturation.deployment}"
    return Text(
        f"Load 1.0 is saturation {how}: rate scale {saturation.rate_scale:.4g}, "
        f"{saturation.requests_per_s:.3g} requests/s. Everything here is simulated."
    )


def _load_table(comparison: Comparison, load: float) -> Table:
    cells = [cell for cell in comparison.cells if cell.load == load]
    seeds = len(cells[0].seeds)
    table = Table(
        title=f"Load {load:g} ({seeds} seed{'s' if seeds > 1 else ''})", title_justify="left"
    )
    table.add_column("policy")
    for title in ("goodput, SLO", f"goodput vs {comparison.reference}"):
        table.add_column(title, justify="right")
    table.add_column("", no_wrap=True)
    for title in ("TTFT", "TPOT", "E2E"):
        table.add_column(f"{title}, ms", justify="right", no_wrap=True)
    table.add_column("requests/s, GPU-h, switches, done", justify="right")
    for cell in cells:
        table.add_row(*_row(cell, comparison.reference), end_section=True)
    return table


def _row(cell: Cell, reference: str) -> list[Text]:
    good = "\n".join(
        with_interval(cell.values[name], BY_NAME[name].unit) for name in _WITH_INTERVAL
    )
    latencies = [
        "\n".join(_milliseconds(cell, f"{kind}_ms_{share}") for share in ("p50", "p90", "p99"))
        for kind in ("ttft", "tpot", "e2e")
    ]
    name = Text(cell.policy, style="bold")
    name.append(f"\n{cell.deployment}", style="not bold")
    return [
        name,
        Text(good),
        _versus(cell, reference),
        Text("p50\np90\np99"),
        *(Text(text) for text in latencies),
        Text(_counts(cell)),
    ]


def _versus(cell: Cell, reference: str) -> Text:
    if cell.policy == reference:
        return Text("reference")
    goodput = next(pair for pair in cell.versus if pair.metric == "goodput_rps")
    return Text(
        f"{ratio_words(goodput.ratio)}\n{goodput.verdict}", style=_COLOURS.get(goodput.verdict, "")
    )


def _milliseconds(cell: Cell, name: str) -> str:
    value = cell.values[name]
    return "never" if value is None else milliseconds(value.mean)


def _counts(cell: Cell) -> str:
    means: dict[str, str] = {}
    for name in _PLAIN:
        value = cell.values[name]
        means[name] = NOTHING if value is None else number(value.mean, BY_NAME[name].unit)
    return (
        f"{means['throughput_rps']} rps, {means['gpu_hours']} h\n"
        f"{means['switches']} in {means['switch_s']} s\n{means['completed_share']}"
    )


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
