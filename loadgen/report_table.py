"""A report as tables for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.report import Report, Spread, TypeReport

_NOTHING = "-"


def report_tables(report: Report) -> RenderableType:
    """Totals, latencies per type, and errors where there were any."""
    parts: list[RenderableType] = [_summary(report), _latencies(report)]
    if report.errors:
        parts.append(_errors(report))
    if (verdict := _verdict(report)) is not None:
        parts.append(verdict)
    return Group(*parts)


def milliseconds(value: float | None) -> str:
    """Three digits that mean something; ``-`` where nothing was measured."""
    if value is None:
        return _NOTHING
    magnitude = round(abs(value), 2)
    if magnitude < 10:  # noqa: PLR2004  # three digits
        return f"{value:.2f}"
    return f"{value:.1f}" if round(magnitude, 1) < 100 else f"{value:,.0f}"  # noqa: PLR2004  # same


def share(value: float | None) -> str:
    """A percentage; only a whole 1 reads 100 %, so that one failure in a million shows."""
    if value is None:
        return _NOTHING
    text = f"{100 * value:.1f} %"
    return "99.9+ %" if text == "100.0 %" and value < 1 else text


def _summary(report: Report) -> Table:
    overall = report.overall
    table = Table(title="Replay", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "trace": report.about.trace,
        "server": f"{report.about.url}  model {report.about.model}",
        "requests": (
            f"{overall.offered:,} offered, {overall.completed:,} completed, "
            f"{overall.failed:,} failed"
        ),
        "duration": f"{report.duration_s:.1f} s, at most {report.in_flight_max:,} in flight",
        "throughput": (
            f"{report.throughput_rps:.2f} requests/s of {report.offered_rps:.2f} offered; "
            f"{report.output_tokens_per_s:,.0f} output tokens/s, "
            f"{report.input_tokens_per_s:,.0f} input tokens/s"
        ),
        "goodput": (
            f"{overall.goodput_rps:.2f} requests/s; "
            f"SLO attainment {share(overall.slo_attainment)} of those offered"
        ),
        "SLO targets": _targets(report),
        "mesh overhead": _line(report.overhead_ms),
        "sent late by": _line(report.lag_ms),
    }
    if report.replicas:
        rows["replicas"] = ", ".join(f"{name} {count:,}" for name, count in report.replicas.items())
    if report.unsent:
        rows["not sent"] = f"{report.unsent:,}: the replay was interrupted"
    if report.resends:
        rows["resent"] = f"{report.resends:,} on a new connection: a kept one had closed"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _targets(report: Report) -> str:
    targets = [
        f"{slo_class} {1000 * target.ttft_s:,g}/{1000 * target.tpot_s:,g}"
        for slo_class, target in report.slo_targets.items()
    ]
    return f"TTFT/TPOT in ms: {', '.join(targets)}"


def _line(spread: Spread | None) -> str:
    if spread is None:
        return _NOTHING
    return (
        f"p50 {milliseconds(spread.p50)} ms, p99 {milliseconds(spread.p99)} ms, "
        f"max {milliseconds(spread.max)} ms"
    )


def _latencies(report: Report) -> Table:
    """Percentiles one below the other: side by side they do not fit on 80 columns."""
    table = Table(title="Latency in ms, of completed requests", title_justify="left")
    for name in ("type", "requests", ""):
        table.add_column(name, no_wrap=name != "requests")
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, entry in report.types.items():
        table.add_row(*_cells(label, entry), end_section=True)
    table.add_row(*_cells("all", report.overall), style="bold")
    return table


def _cells(label: str, entry: TypeReport) -> list[Text]:
    spreads = (entry.ttft_ms, entry.tpot_ms, entry.itl_ms, entry.e2e_ms)
    requests = f"{entry.offered:,} offered\n{entry.failed:,} failed"
    requests += f"\nSLO {share(entry.slo_attainment)}"
    latencies = [
        _NOTHING
        if spread is None
        else "\n".join(milliseconds(value) for value in (spread.p50, spread.p90, spread.p99))
        for spread in spreads
    ]
    return [Text(text) for text in (label, requests, "p50\np90\np99", *latencies)]


def _errors(report: Report) -> Table:
    table = Table(title="Errors", title_justify="left")
    table.add_column("code", no_wrap=True)
    table.add_column("requests", justify="right")
    table.add_column("the first said")
    for code, count in report.errors.items():
        table.add_row(Text(code), f"{count:,}", Text(report.error_examples.get(code, "")))
    return table


def _verdict(report: Report) -> Text | None:
    """What a reader should know before believing the numbers."""
    lag = report.lag_ms
    if lag is not None and lag.p99 > _LAG_MS_MAX:
        return Text(
            f"The load generator sent late (p99 {milliseconds(lag.p99)} ms): this machine is too "
            "busy for the offered load, and the latencies here are partly its own.",
            style="yellow",
        )
    return None


_LAG_MS_MAX = 100.0
