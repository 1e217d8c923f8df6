"""Figures of plans as people read them."""

import re
from collections.abc import Iterable, Sequence

NOTHING = "-"
_GPU = re.compile(r"(.*-g)(\d+)")


def milliseconds(value_s: float | None) -> str:
    """Of seconds."""
    return NOTHING if value_s is None else rate(1000.0 * value_s)


def pair(first: float | None, second: float | None) -> str:
    """Two times of seconds in ms, p50 and p99."""
    if first is None and second is None:
        return NOTHING
    return f"{milliseconds(first)} / {milliseconds(second)}"


def seconds(value: float | None) -> str:
    """As they are."""
    return NOTHING if value is None else rate(value)


def rate(value: float) -> str:
    """A figure without its unit, three digits of it, and never as a power of ten."""
    if abs(value) >= 999.5:  # noqa: PLR2004  # what three digits would round to 1e+03
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e" in text else text


def times(value: float | None) -> str:
    """``1.43 x``."""
    return NOTHING if value is None else f"{value:.2f} x"


def percent(value: float | None) -> str:
    """A share or a ratio, whole."""
    return NOTHING if value is None else f"{100 * value:,.0f} %"


def shape(parallelism: str) -> str:
    """``tp4``; ``tp4pp2`` where there is a pipeline."""
    return parallelism.removesuffix("pp1")


def gpus(ids: Sequence[str]) -> str:
    """``n0-g0..3 n1-g4``: runs of neighbours by their first and last."""
    parts: list[str] = []
    run: list[str] = []
    for gpu in ids:
        if run and _follows(run[-1], gpu):
            run.append(gpu)
            continue
        parts += [_run(run)] if run else []
        run = [gpu]
    parts += [_run(run)] if run else []
    return " ".join(parts)


def _follows(gpu: str, other: str) -> bool:
    first, second = _GPU.fullmatch(gpu), _GPU.fullmatch(other)
    if first is None or second is None:
        return False
    return first[1] == second[1] and int(second[2]) == int(first[2]) + 1


def _run(run: Sequence[str]) -> str:
    match = _GPU.fullmatch(run[-1])
    return run[0] if len(run) == 1 or match is None else f"{run[0]}..{match[2]}"


def counted(items: Iterable[tuple[str, float]]) -> str:
    """``chat: 3.2, code: 1.1``: rates by name."""
    return ", ".join(f"{name}: {rate(value)}" for name, value in items) or NOTHING
