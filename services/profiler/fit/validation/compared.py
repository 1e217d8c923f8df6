"""Predictions beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from services.profiler.fit.grid import Floats


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairs of (predicted, measured), in one unit, of one quantity from one source. ``gpu`` and
    ``model`` are "" where there are several. ``calibrated`` says what of the prediction was fitted
    to what. ``levelled``: the source's level is not that of today's kernels, so errors count after
    one factor, too."""

    source: str
    what: str
    gpu: str
    model: str
    pairs: Sequence[tuple[float, float]]
    calibrated: str
    levelled: bool = False
    notes: Sequence[str] = field(default=())


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Relative errors |predicted / measured - 1|. ``level``: median of measured / predicted;
    ``level_*`` are the errors once predictions are multiplied by it, ``offset_*`` once the median
    of measured - predicted is added to them: an older engine has slower kernels, a slower host, or
    both (None if that is not asked)."""

    source: str
    what: str
    gpu: str
    model: str
    rows: int
    median: float
    p90: float
    bias: float  # median of predicted / measured - 1
    level: float
    level_median: float | None
    level_p90: float | None
    offset_median: float | None
    offset_p90: float | None
    calibrated: str
    notes: tuple[str, ...]


def accuracy(one: Comparison) -> Accuracy:
    """Raises ValueError for no rows: an error of nothing is no error."""
    if not one.pairs:
        raise ValueError(f"{one.source}: {one.what}: nothing to compare")
    predicted, measured = np.array(one.pairs, dtype=np.float64).T
    ratio = predicted / measured
    level = float(np.median(1 / ratio))
    median, p90 = _quantiles(ratio)
    offset = float(np.median(measured - predicted))
    levels = _quantiles(ratio * level) if one.levelled else (None, None)
    offsets = _quantiles(ratio + offset / measured) if one.levelled else (None, None)
    return Accuracy(
        source=one.source,
        what=one.what,
        gpu=one.gpu,
        model=one.model,
        rows=len(one.pairs),
        median=median,
        p90=p90,
        bias=round(float(np.median(ratio)) - 1, 4),
        level=round(level, 4),
        level_median=levels[0],
        level_p90=levels[1],
        offset_median=offsets[0],
        offset_p90=offsets[1],
        calibrated=one.calibrated,
        notes=tuple(one.notes),
    )


def _quantiles(ratio: Floats) -> tuple[float, float]:
    errors = np.abs(ratio - 1)
    return round(float(np.quantile(errors, 0.5)), 4), round(float(np.quantile(errors, 0.9)), 4)
