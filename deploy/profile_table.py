"""What a profile predicts, as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.report_table import milliseconds

if TYPE_CHECKING:
    from deploy.profile import Listed, Shown

_NOTHING = "-"
_GB = 1e9


def profile_tables(shown: Shown) -> RenderableType:
    """Facts, then figures by batch, by context and by prompt length."""
    return Group(_facts(shown), _by_batch(shown), _by_context(shown), _by_prompt(shown))


def capacities_table(rows: list[Listed]) -> RenderableType:
    """One row for each GPU and model, one column for each shape that fits any of them."""
    shapes: dict[str, None] = {}
    for row in rows:
        shapes |= dict.fromkeys(row.kv_tokens)
    ordered = sorted(shapes, key=lambda shape: (_pp(shape), len(shape), shape))
    table = Table(title="KV capacity in tokens, by shape; - : does not fit", title_justify="left")
    table.add_column("gpu")
    table.add_column("model", no_wrap=True)
    for shape in ordered:
        table.add_column(shape.replace("pp1", "") if shape.endswith("pp1") else shape, justify="right")
    for row in rows:
        held = [row.kv_tokens.get(shape) for shape in ordered]
        table.add_row(row.gpu, row.model, *(tokens(count) if count else _NOTHING for count in held))
    return table


def tokens(count: int) -> str:
    """Three digits that mean something: 8,410, 98.4k, 1.23M."""
    for size, unit in ((1_000_000, "M"), (10_000, "k")):
        if count >= size:
            value = count / (1_000_000 if unit == "M" else 1_000)
            return f"{value:.3g}{unit}" if value < 1000 else f"{value:,.0f}{unit}"  # noqa: PLR2004
    return f"{count:,}"


def _pp(shape: str) -> int:
    return int(shape.rpartition("pp")[2])


def _facts(shown: Shown) -> Table:
    error = shown.error
    table = Table(
        title=f"{shown.model} on {shown.gpu}, {shown.shape}", show_header=False, title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    gpus = sum(1 for _ in shown.stages) * int(shown.shape[2:].split("pp")[0])
    where = f"{gpus} GPU{'s' if gpus > 1 else ''} on {shown.nodes} node{'s' * (shown.nodes > 1)}"
    if len(shown.stages) > 1:
        where += f", layers {' + '.join(map(str, shown.stages))}"
    table.add_row("replica", f"{where}, {shown.price_per_hour:.2f} $/h")
    heaviest = max(shown.weight_bytes) / _GB
    table.add_row("weights", f"{heaviest:.1f} GB of {shown.memory_bytes / _GB:.1f} on the fullest GPU")
    table.add_row("KV cache", f"{shown.kv_tokens:,} tokens")
    table.add_row("start-up", f"{shown.start_s:.1f} s, {shown.reload_s:.1f} of them weights from disk")
    table.add_row(
        "error",
        f"step {error.step_median:.0%} median, {error.step_p90:.0%} p90; TTFT {error.ttft_p90:.0%}, "
        f"ITL {error.itl_p90:.0%} p90" + (f" ({error.basis})" if error.basis else ""),
    )
    if shown.source:
        table.add_row("source", Text(shown.source))
    return table


def _by_batch(shown: Shown) -> Table:
    table = Table(
        title=f"By batch: {shown.input_tokens:,} input and {shown.output_tokens:,} output tokens",
        caption="ITL and throughput with the prompts of those that follow mixed in; TTFT on an idle "
        f"replica and beside the batch, without queueing. The largest batch is "
        f"{shown.estimates[0].batch_max}; what exceeds it is dim.",
        title_justify="left",
        caption_justify="left",
    )
    for name in (
        "batch", "step ms", "ITL ms", "TTFT ms", "TTFT busy ms", "output tokens/s", "requests/s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for one in shown.estimates:
        table.add_row(
            f"{one.batch}",
            *(
                milliseconds(1000 * value)
                for value in (one.step_s, one.itl_s, one.ttft_s, one.ttft_busy_s)
            ),
            f"{one.tokens_per_s:,.0f}",
            f"{one.requests_per_s:.3g}",
            style=None if one.fits else "dim",
        )
    return table


def _by_context(shown: Shown) -> Table:
    table = Table(
        title="Decode step in ms, by batch and tokens of context of each request", title_justify="left"
    )
    table.add_column("batch", justify="right")
    for context in shown.contexts:
        table.add_column(f"{context:,}", justify="right")
    for batch, row in zip(shown.batches, shown.steps_s, strict=True):
        table.add_row(f"{batch}", *(milliseconds(_ms(value)) for value in row))
    return table


def _by_prompt(shown: Shown) -> Table:
    table = Table(title="TTFT in ms on an idle replica, by tokens of prompt", title_justify="left")
    for prompt in shown.prompts:
        table.add_column(f"{prompt:,}", justify="right")
    table.add_row(*(milliseconds(_ms(value)) for value in shown.prompts_s))
    return table


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else 1000 * value_s
