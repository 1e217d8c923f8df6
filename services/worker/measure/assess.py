"""How well a profile predicts what was measured, and its table for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from services.worker.measure.sweep import Row, Scenario
from shared.cost.profile import ErrorBar, GpuFacts, Profile
from shared.cost.step import PS_PER_S, step_model
from shared.hardware import Parallelism

HOLD_OUT_EACH = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """A row and what the profile says to it."""

    row: Row
    predicted_s: float
    held_out: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.row.time_s - 1


def split(rows: Sequence[Row], scenarios: Iterable[Scenario]) -> tuple[list[Row], list[Row]]:
    """Rows to fit and rows held out: those of the scenarios made for it, and each fourth of the
    others, in an order that does not depend on how long anything took."""
    judges = {scenario.name for scenario in scenarios if scenario.held_out}
    fitted: list[Row] = []
    held_out = [row for row in rows if row.origin in judges]
    rest = sorted((row for row in rows if row.origin not in judges), key=_order)
    for index, row in enumerate(rest):
        held = index % HOLD_OUT_EACH == HOLD_OUT_EACH - 1
        (held_out if held else fitted).append(row)
    return fitted, held_out


def _order(row: Row) -> tuple[int, ...]:
    shape, prefill = row.shape, row.shape.prefill
    return (
        bool(shape.batch), bool(prefill.tokens), shape.tokens, shape.batch, shape.context,
        prefill.chunks, prefill.pairs, prefill.ending,
    )  # fmt: skip


def judge(
    profile: Profile, gpu: GpuFacts, fitted: Iterable[Row], held_out: Iterable[Row]
) -> list[Judged]:
    """By the very predictor that engines and simulator use."""
    model = step_model(profile, gpu, Parallelism())

    def predicted_s(row: Row) -> float:
        shape = row.shape
        return model.step_ps(shape.batch, shape.context, shape.prefill) / PS_PER_S

    judged = [Judged(row, predicted_s(row), held_out=False) for row in fitted]
    judged += [Judged(row, predicted_s(row), held_out=True) for row in held_out]
    return sorted(judged, key=lambda one: _order(one.row))


def error_bar(judged: Sequence[Judged], scenarios: Iterable[Scenario]) -> ErrorBar:
    """Of the held-out rows. TTFT is made of steps with prompts in them, ITL of steps that decode,
    so their bars are those of such steps; sums of many steps err less, as the basis tells of the
    made-up trace that was held out whole."""
    held_out = [one for one in judged if one.held_out]
    steps = quantiles(held_out)
    prompts = quantiles([one for one in held_out if one.row.shape.prefill.tokens])
    decodes = quantiles([one for one in held_out if one.row.shape.batch])
    return ErrorBar(
        step_median=round(steps[0], 4),
        step_p90=round(steps[1], 4),
        ttft_p90=round(prompts[1], 4),
        itl_p90=round(decodes[1], 4),
        basis=f"{len(held_out)} kinds of steps held out, {len(judged) - len(held_out)} fitted"
        + _sums(held_out, [scenario.name for scenario in scenarios if scenario.held_out]),
    )


def _sums(held_out: Sequence[Judged], names: Iterable[str]) -> str:
    text = ""
    for name in names:
        steps = [one for one in held_out if one.row.origin == name]
        measured_s = sum(one.row.time_s for one in steps)
        if steps:
            error = sum(one.predicted_s for one in steps) / measured_s - 1
            text += f"; {name}, the sum of its {len(steps)} kinds of steps: {error:+.1%}"
    return text


def quantiles(judged: Sequence[Judged]) -> tuple[float, float]:
    """Median and 90th percentile of the absolute errors; zeros for none."""
    if not judged:
        return 0.0, 0.0
    errors = np.abs([one.error for one in judged])
    return float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.9))


def table(judged: Sequence[Judged]) -> str:
    """Every row, then the errors by kind of step."""
    head = ("batch", "context", "prompt", "chunks", "pairs", "measured ms", "predicted", "error")
    lines = ["  ".join(f"{name:>{_width(name)}}" for name in head)]
    for one in judged:
        shape, prefill = one.row.shape, one.row.shape.prefill
        cells = (
            str(shape.batch), str(shape.context), str(prefill.tokens), str(prefill.chunks),
            str(prefill.pairs), f"{one.row.time_s * 1e3:.3f}", f"{one.predicted_s * 1e3:.3f}",
            f"{one.error:+.1%}",
        )  # fmt: skip
        row = "  ".join(f"{c:>{_width(name)}}" for c, name in zip(cells, head, strict=True))
        lines.append(row + ("  held out" if one.held_out else ""))
    return "\n".join([*lines, "", *_summary(judged)])


def _width(name: str) -> int:
    return max(len(name), 9)


def _summary(judged: Sequence[Judged]) -> list[str]:
    kinds = {
        "decode": [one for one in judged if not one.row.shape.prefill.tokens],
        "prompts": [one for one in judged if not one.row.shape.batch],
        "both": [one for one in judged if one.row.shape.batch and one.row.shape.prefill.tokens],
        "all": list(judged),
    }
    lines = ["steps     fitted  median     p90   held out  median     p90"]
    for name, ones in kinds.items():
        fitted = [one for one in ones if not one.held_out]
        held_out = [one for one in ones if one.held_out]
        (mid, high), (held_mid, held_high) = quantiles(fitted), quantiles(held_out)
        lines.append(
            f"{name:8}  {len(fitted):6}  {mid:6.1%}  {high:6.1%}   "
            f"{len(held_out):8}  {held_mid:6.1%}  {held_high:6.1%}"
        )
    return lines
