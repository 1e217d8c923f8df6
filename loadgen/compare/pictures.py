"""A comparison as pictures: measures against load, shapes over time, distributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from loadgen.compare.metrics import QUANTILES, Latency, RunMetrics
from loadgen.compare.outcome import BY_NAME, Cell, Comparison
from loadgen.simulator.deployments import gpus_by_shape

# matplotlib's; their own annotations are partial, and it may not be installed.
Axes = Any
AnyFigure = Any

# Okabe and Ito's palette: told apart by readers with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_STYLES = ("-", "--", ":", "-.")
_AGAINST_LOAD = ("goodput_rps", "slo_attainment", "ttft_ms_p99", "tpot_ms_p99", "e2e_ms_p99",
                 "gpu_hours")  # fmt: skip
_SWITCHING_MAX = 8  # timelines in one picture
_DPI = 130
_WIDE = 8.0  # a range that shows three ticks of 1, 2, 5


def can_draw() -> bool:
    """Whether matplotlib, of the extra ``report``, is there."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  # optional, and slow to import
    except ImportError:
        return False
    del mpl
    return True


def draw_all(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write the pictures into ``folder``; file name to what it shows."""
    drawn = {"load.png": "Measures against load; bands are 95 % intervals over the seeds"}
    _draw_load(comparison, folder / "load.png")
    load = picture_load(comparison)
    drawn["distributions.png"] = f"Distributions at load {load:g}, first seed"
    _draw_distributions(comparison, load, folder / "distributions.png")
    switching = {text.name for text in comparison.policies if text.switches}
    cells = [c for c in comparison.cells if c.load == load and c.policy in switching]
    if cells:
        drawn["shapes.png"] = f"GPUs by shape over time at load {load:g}, first seed"
        _draw_shapes(comparison, cells[:_SWITCHING_MAX], folder / "shapes.png")
    return drawn


def picture_load(comparison: Comparison) -> float:
    """The load whose runs are drawn in detail: the largest up to saturation, else the smallest."""
    borne = [load for load in comparison.loads if load <= 1.0]
    return max(borne) if borne else min(comparison.loads)


def _figure(width: float, height: float) -> AnyFigure:
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above; no global state, no display

    return cast("AnyFigure", Figure(figsize=(width, height), layout="constrained"))


def _looks(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    return {
        name: {
            "color": _COLOURS[place % len(_COLOURS)],
            "linestyle": _STYLES[place // len(_COLOURS) % len(_STYLES)],
        }
        for place, name in enumerate(names)
    }


def _draw_load(comparison: Comparison, path: Path) -> None:
    figure = _figure(15, 8)
    grid: Any = figure.subplots(2, 3, sharex=True)
    looks = _looks([text.name for text in comparison.policies])
    for axes, name in zip(grid.flat, _AGAINST_LOAD, strict=True):
        metric = BY_NAME[name]
        for policy, look in looks.items():
            cells = [cell for cell in comparison.cells if cell.policy == policy]
            _draw_line(axes, cells, name, look, label=policy)
        unit = f" ({metric.unit})" if metric.unit else ""
        axes.set_title(metric.title + unit, loc="left", fontsize=10.5)
        if metric.unit == "ms":
            _log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("load (1: saturation of the best static deployment)")
        _finish(axes)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _log_scale(axes: Axes) -> None:
    """Plain numbers, and enough of them also where the values span less than a decade."""
    from matplotlib import ticker  # noqa: PLC0415  # as above

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high > _WIDE * low
    locator = ticker.LogLocator(subs=(1.0, 2.0, 5.0)) if wide else ticker.MaxNLocator(nbins=6)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")


def _draw_line(
    axes: Axes, cells: Sequence[Cell], name: str, look: Mapping[str, Any], *, label: str
) -> None:
    known = [(cell.load, value) for cell in cells if (value := cell.values[name]) is not None]
    loads = [load for load, _ in known]
    axes.plot(loads, [value.mean for _, value in known], marker="o", ms=3, label=label, **look)
    low = [value.mean if value.low is None else value.low for _, value in known]
    high = [value.mean if value.high is None else value.high for _, value in known]
    axes.fill_between(loads, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _draw_distributions(comparison: Comparison, load: float, path: Path) -> None:
    figure = _figure(15, 4.8)
    grid: Any = figure.subplots(1, 3, sharey=True)
    looks = _looks([text.name for text in comparison.policies])
    kinds: tuple[tuple[str, str], ...] = (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2e"))
    for axes, (title, kind) in zip(grid.flat, kinds, strict=True):
        for policy, look in looks.items():
            curve = _curve(comparison.cell(policy, load).runs[0], kind)
            known = [(ms, q) for ms, q in zip(curve, QUANTILES, strict=False) if ms is not None]
            axes.plot([ms for ms, _ in known], [q for _, q in known], label=policy, **look)
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_title(f"{title} (ms), share of requests below", loc="left", fontsize=10.5)
        _finish(axes)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _curve(run: RunMetrics, kind: str) -> tuple[float | None, ...]:
    latencies: dict[str, Latency] = {"ttft": run.ttft_ms, "tpot": run.tpot_ms, "e2e": run.e2e_ms}
    return latencies[kind].curve


def _draw_shapes(comparison: Comparison, cells: Sequence[Cell], path: Path) -> None:
    """The GPUs of each shape, stacked, as the plans in force name them."""
    figure = _figure(13, 1.2 + 1.9 * len(cells))
    grid: Any = figure.subplots(len(cells), 1, sharex=True, squeeze=False)
    steps = {cell.policy: _steps(cell, comparison.about.window_s) for cell in cells}
    shapes = sorted({shape for times in steps.values() for _, gpus in times for shape in gpus})
    looks = _looks(shapes)
    for axes, cell in zip(grid.flat, cells, strict=True):
        times = [at_s for at_s, _ in steps[cell.policy]]
        rows = [[float(gpus.get(s, 0)) for _, gpus in steps[cell.policy]] for s in shapes]
        colours = [looks[shape]["color"] for shape in shapes]
        axes.stackplot(times, rows, step="post", labels=shapes, colors=colours, alpha=0.8)
        for moment in cell.runs[0].moments:
            if moment.moved:
                axes.axvspan(moment.at_s, moment.at_s + moment.took_s, color="black", alpha=0.15)
        axes.set_title(f"{cell.policy}: GPUs by shape (grey: switching)", loc="left", fontsize=10)
        axes.set_xlim(0, comparison.about.window_s)
        _finish(axes)
    grid.flat[-1].set_xlabel("time of the trace's window (s)")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _steps(cell: Cell, window_s: float) -> list[tuple[float, dict[str, int]]]:
    """When the plan in force changed, and its GPUs by shape from then on."""
    steps = [(0.0, gpus_by_shape(cell.deployment))]
    steps += [
        (moment.at_s + moment.took_s, gpus_by_shape(moment.plan))
        for moment in cell.runs[0].moments
        if moment.succeeded
    ]
    return [*steps, (max(window_s, steps[-1][0]), steps[-1][1])]


def _finish(axes: Axes) -> None:
    axes.grid(visible=True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
