"""What a profile predicts, as tables for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.profile_view import Listed, Shown
from loadgen.report_table import milliseconds
from shared.hardware import Parallelism

_NOTHING = "-"
_GB = 1e9


def profile_tables(shown: Shown) -> RenderableType:
    """Facts, then figures by batch, by context and by prompt length."""
    return Group(_facts(shown), _by_batch(shown), _by_context(shown), _by_prompt(shown))


def capacities_table(rows: list[Listed]) -> RenderableType:
    """A row for each GPU, model and number of stages, a column for each number of ranks."""
    shapes = {(row.gpu, row.model): _by_stages(row) for row in rows}
    ranks = sorted({tp for held in shapes.values() for by_tp in held.values() for tp in by_tp})
    table = Table(title="KV capacity in tokens; - : does not fit", title_justify="left")
    for name in ("gpu", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("stages", *(f"tp{tp}" for tp in ranks)):
        table.add_column(name, justify="right", no_wrap=True)
    for (gpu, model), held in shapes.items():
        for place, (pp, by_tp) in enumerate(sorted(held.items())):
            cells = [tokens(by_tp[tp]) if tp in by_tp else _NOTHING for tp in ranks]
            table.add_row(*((gpu, model) if place == 0 else ("", "")), f"pp{pp}", *cells)
        if not held:
            table.add_row(gpu, model, _NOTHING, *(_NOTHING for _ in ranks))
        table.add_section()
    return table


def _by_stages(row: Listed) -> dict[int, dict[int, int]]:
    """Capacity by pp, then by tp."""
    held: dict[int, dict[int, int]] = {}
    for name, count in row.kv_tokens.items():
        shape = Parallelism.parse(name)
        held.setdefault(shape.pp, {})[shape.tp] = count
    return held


def tokens(count: int) -> str:
    """Three digits that mean something: 8,410, 98.4k, 1.23M."""
    for size, shown_from, unit in ((1_000_000, 999_500, "M"), (1_000, 10_000, "k")):
        if count >= shown_from:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"


def _facts(shown: Shown) -> Table:
    error = shown.error
    table = Table(
        title=f"{shown.model} on {shown.gpu}, {shown.shape}",
        show_header=False,
        title_justify="left",
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    gpus = Parallelism.parse(shown.shape).gpus
    where = f"{gpus} GPU{'s' if gpus > 1 else ''} on {shown.nodes} node{'s' * (shown.nodes > 1)}"
    if len(shown.stages) > 1:
        where += f", layers {' + '.join(map(str, shown.stages))}"
    table.add_row("replica", f"{where}, {shown.price_per_hour:.2f} $/h")
    heaviest = max(shown.weight_bytes) / _GB
    table.add_row(
        "weights", f"{heaviest:.1f} GB of {shown.memory_bytes / _GB:.1f} on the fullest GPU"
    )
    table.add_row("KV cache", f"{shown.kv_tokens:,} tokens")
    table.add_row(
        "start-up", f"{shown.start_s:.1f} s, {shown.reload_s:.1f} of them weights from disk"
    )
    table.add_row(
        "error",
        f"step {error.step_median:.0%} median, {error.step_p90:.0%} p90; "
        f"TTFT {error.ttft_p90:.0%}, ITL {error.itl_p90:.0%} p90"
        + (f" ({error.basis})" if error.basis else ""),
    )
    if shown.source:
        table.add_row("source", Text(shown.source))
    return table


def _by_batch(shown: Shown) -> Table:
    table = Table(
        title=f"By batch: {shown.input_tokens:,} input and {shown.output_tokens:,} output tokens",
        caption="ITL and throughput: with the prompts of those that follow mixed in. TTFT: on an "
        "idle replica, and beside the batch; without queueing. The largest batch is "
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
        title="Decode step in ms, by batch and tokens of context of each request",
        title_justify="left",
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
