"""What a profile predicts, as a picture: latency and throughput against batch and context."""

from pathlib import Path
from typing import Any, cast

from deploy.profile_view import Shown
from loadgen.picture import check_picture

# matplotlib's; their own annotations are partial, and it may not be installed.
Axes = Any

# Okabe and Ito's palette, as in loadgen/picture.py.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_LIMIT = "#C00000"


def draw_profile(shown: Shown, path: Path) -> None:
    """Write the picture to ``path``, PNG or SVG; raises ConfigInvalid for any other."""
    check_picture(path)
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional; no global state, no display

    figure: Any = cast("Any", Figure(figsize=(11, 8), layout="constrained"))
    (itl, ttft), (rate, step) = figure.subplots(2, 2)
    batches = [one.batch for one in shown.estimates]
    error = shown.error
    _line(itl, batches, [1e3 * one.itl_s for one in shown.estimates], "ITL", 0, error.itl_p90)
    _line(itl, batches, [1e3 * one.step_s for one in shown.estimates], "step, decode only", 1)
    _finish(itl, shown, title="ITL (band: p90 error)", ylabel="ms")
    busy = [1e3 * one.ttft_busy_s for one in shown.estimates]
    _line(ttft, batches, busy, "beside the batch", 0, error.ttft_p90)
    _line(ttft, batches, [1e3 * one.ttft_s for one in shown.estimates], "idle replica", 1)
    _finish(ttft, shown, title="TTFT, no queue (band: p90 error)", ylabel="ms")
    _line(rate, batches, [one.tokens_per_s for one in shown.estimates], "output tokens/s", 2)
    _finish(rate, shown, title="Throughput", ylabel="tokens / s")
    for place, context in enumerate(shown.contexts):
        known = [
            (batch, 1e3 * step_s)
            for batch, row in zip(shown.batches, shown.steps_s, strict=True)
            if (step_s := row[place]) is not None
        ]
        if known:
            label = f"{context:,} tokens"
            _line(step, [batch for batch, _ in known], [ms for _, ms in known], label, place)
    _finish(step, shown, title="Decode step, by context of each request", ylabel="ms", limit=False)
    figure.suptitle(
        f"{shown.model} on {shown.gpu}, {shown.shape}: {shown.input_tokens:,} input and "
        f"{shown.output_tokens:,} output tokens; KV cache {shown.kv_tokens:,} tokens",
        fontsize=12,
        fontweight="bold",
    )
    figure.savefig(path, dpi=140)


def _line(
    axes: Axes, x: list[int], y: list[float], label: str, colour: int, error: float = 0.0
) -> None:
    shade = _COLOURS[colour % len(_COLOURS)]
    axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.8, color=shade, label=label)
    if error:
        lower, upper = [v * max(0.0, 1 - error) for v in y], [v * (1 + error) for v in y]
        axes.fill_between(x, lower, upper, color=shade, alpha=0.15, linewidth=0)


def _finish(axes: Axes, shown: Shown, *, title: str, ylabel: str, limit: bool = True) -> None:
    batches = [one.batch for one in shown.estimates]
    most = shown.estimates[0].batch_max
    if limit and min(batches) <= most < max(batches):
        axes.axvline(most, color=_LIMIT, linewidth=1, linestyle="-.", label=f"largest batch {most}")
    if len(batches) > 1:
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlabel("batch")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
