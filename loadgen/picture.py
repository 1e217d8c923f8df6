"""A report as a picture: load, latency and tokens over time. PNG or SVG, by the file's ending."""

from pathlib import Path
from typing import Any, cast

from loadgen.report import Report
from shared.errors import ConfigInvalid

# matplotlib's; their own annotations are partial, and it may not be installed.
Axes = Any
AnyFigure = Any

_ENDINGS = (".png", ".svg")
# Okabe and Ito's palette: told apart by readers with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_FAILED = "#C00000"
_MARK_COLOURS = {"loss": _FAILED, "switch": "#6A3D9A"}
_MARK_STYLES = ("-.", ":", "--", "-")
_MARKS_NAMED = 4  # more would fill the legend
_TYPES_MAX = 7  # more lines cannot be told apart; the rest is drawn as one


def check_picture(path: Path) -> None:
    """Raises ConfigInvalid for what ``draw`` could not do, before a replay is spent on it."""
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigInvalid(field="picture", value=str(path), remedy="end it in .png or .svg")
    try:
        import matplotlib as mpl  # noqa: PLC0415  # optional, and slow to import
    except ImportError:
        raise ConfigInvalid(
            field="picture",
            value=str(path),
            remedy="drawing needs the extra `report`: pip install 'oserve[report]'",
        ) from None
    del mpl


def draw(report: Report, path: Path) -> None:
    """Write the picture of ``report`` to ``path``."""
    check_picture(path)
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above; no global state, no display

    figure: AnyFigure = cast("AnyFigure", Figure(figsize=(11, 9), layout="constrained"))
    axes: Axes = figure.subplots(3, 1, sharex=True)
    load, latency, tokens = axes
    _draw_load(load, report)
    _draw_latency(latency, report)
    _draw_tokens(tokens, report)
    tokens.set_xlabel(f"time since the replay began (s), in steps of {report.timeline.bucket_s:g}")
    overall = report.overall
    attained = overall.slo_attainment
    title = (
        f"{Path(report.about.trace).name or 'replay'}: {overall.completed:,} of "
        f"{overall.offered:,} requests completed, {report.output_tokens_per_s:,.0f} output tokens/s"
    )
    if attained is not None:
        title += f", SLO attainment {100 * attained:.1f} %"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=140)


def _times_s(report: Report) -> list[float]:
    """The middle of each bucket."""
    line = report.timeline
    return [(place + 0.5) * line.bucket_s for place in range(line.buckets)]


def _draw_load(axes: Axes, report: Report) -> None:
    """Each type's arrivals dotted and completions solid; failures as crosses on the floor."""
    times_s = _times_s(report)
    offered = _few_types(report.timeline.offered_rps, report)
    completed = _few_types(report.timeline.completed_rps, report)
    for kind, colour in zip(offered, _COLOURS, strict=False):
        axes.plot(times_s, offered[kind], color=colour, linestyle=":", linewidth=1.4)
        axes.plot(times_s, completed[kind], color=colour, linewidth=1.8, label=kind)
    axes.plot([], [], color="grey", linestyle=":", linewidth=1.4, label="dotted: offered")
    axes.plot([], [], color="grey", linewidth=1.8, label="solid: completed")
    failed = [(at, count) for at, count in zip(times_s, report.timeline.failed, strict=True)]
    failed = [(at, count) for at, count in failed if count]
    if failed:
        total = sum(count for _, count in failed)
        axes.scatter(
            [at for at, _ in failed],
            [0.0] * len(failed),
            marker="x",
            s=[30 + 2 * min(count, 60) for _, count in failed],
            color=_FAILED,
            label=f"failed ({total:,})",
            zorder=5,
            clip_on=False,
        )
    _finish(axes, report, ylabel="requests / s", title="Load by type")


def _few_types(series: dict[str, list[float]], report: Report) -> dict[str, list[float]]:
    """The busiest types as they are, the others summed."""
    order = sorted(series, key=lambda kind: -report.types[kind].offered)
    kept = {kind: series[kind] for kind in order[:_TYPES_MAX]}
    rest = [series[kind] for kind in order[_TYPES_MAX:]]
    if rest:
        kept[f"{len(rest)} other types"] = [sum(values) for values in zip(*rest, strict=True)]
    return kept


def _draw_latency(axes: Axes, report: Report) -> None:
    from matplotlib import ticker  # noqa: PLC0415  # optional, and slow to import

    line = report.timeline
    times_s = _times_s(report)
    for name, colour, middle, tail in (
        ("TTFT", _COLOURS[0], line.ttft_ms_p50, line.ttft_ms_p99),
        ("E2E", _COLOURS[5], line.e2e_ms_p50, line.e2e_ms_p99),
    ):
        lower = [float("nan") if value is None else value for value in middle]
        upper = [float("nan") if value is None else value for value in tail]
        axes.plot(times_s, lower, color=colour, linewidth=1.8, label=f"{name} p50")
        axes.plot(times_s, upper, color=colour, linewidth=1.2, linestyle="--", label=f"{name} p99")
        axes.fill_between(times_s, lower, upper, color=colour, alpha=0.10, linewidth=0)
    if report.overall.completed:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    _finish(
        axes,
        report,
        ylabel="ms, log scale",
        title="Latency of completed requests, by time of arrival",
    )


def _draw_tokens(axes: Axes, report: Report) -> None:
    times_s = _times_s(report)
    rates = report.timeline.output_tokens_per_s
    axes.fill_between(times_s, rates, color=_COLOURS[2], alpha=0.25, linewidth=0)
    axes.plot(times_s, rates, color=_COLOURS[2], linewidth=1.8, label="output tokens received")
    _finish(axes, report, ylabel="tokens / s", title="Output tokens")


def _finish(axes: Axes, report: Report, *, ylabel: str, title: str) -> None:
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=10.5)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    for number, mark in enumerate(report.marks):
        label = mark.text if number == 0 or len(report.marks) <= _MARKS_NAMED else None
        style = _MARK_STYLES[number % len(_MARK_STYLES)]
        colour = _MARK_COLOURS[mark.kind]
        axes.axvline(mark.at_s, color=colour, linewidth=1.2, linestyle=style, label=label)
    axes.set_xlim(0, report.timeline.buckets * report.timeline.bucket_s)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(visible=True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
