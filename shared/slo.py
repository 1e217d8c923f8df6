"""Service-level objectives: classes, targets, and the measures made of them, defined once.

TTFT: arrival to first token. TPOT: a request's mean time per output token after the first.
ITL: each gap between token arrivals. Goodput: requests per second that meet both targets.
SLO attainment: the share of requests that do.
"""

from typing import Literal

import msgspec

SloClass = Literal["interactive", "standard", "batch"]
SLO_CLASSES: tuple[SloClass, ...] = ("interactive", "standard", "batch")


class SloTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ttft_s: float
    tpot_s: float


DEFAULT_TARGETS: dict[SloClass, SloTarget] = {
    "interactive": SloTarget(ttft_s=0.5, tpot_s=0.05),
    "standard": SloTarget(ttft_s=2.0, tpot_s=0.1),
    "batch": SloTarget(ttft_s=60.0, tpot_s=1.0),
}


def tpot_s(*, ttft_s: float, e2e_s: float, output_tokens: int) -> float | None:
    """A request's mean time per output token after the first; None with fewer than two."""
    if output_tokens < 2:  # noqa: PLR2004  # a gap needs two tokens
        return None
    return max(0.0, e2e_s - ttft_s) / (output_tokens - 1)


def meets(target: SloTarget, *, ttft_s: float | None, tpot_s: float | None) -> bool:
    """Whether a completed request met its targets; one without a first token never does."""
    if ttft_s is None or ttft_s > target.ttft_s:
        return False
    return tpot_s is None or tpot_s <= target.tpot_s
