"""What one replica sustains of one request type: the n[shape, type] of the planners.

The largest batch B in steady state (``shared/cost/steady.py``) that

    kv       holds its expected tokens in the KV cache: B (i + o / 2), and prompts under way
    seats    leaves room under ``running_max``, prompts under way included
    compute  leaves prompts enough of each step's token budget to keep up; a lone request that does
             not is followed by the next one as soon as its prompt is computed
    tpot     decodes at a mean ITL within the TPOT target
    ttft     lets a prompt that arrives beside it meet the TTFT target, if it need not queue

gives the rate B / ((o - 1) ITL(B)): Little's law for the requests that decode. It is a fluid limit,
the replica busy all the time; what waiting costs at a given load, ``latency.py`` estimates.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from shared.cost.limits import DEFAULT_LIMITS, EngineLimits
from shared.cost.model import CostModel
from shared.cost.steady import Steady, Work, prompt_s, prompts_only_per_s, steady

RATES_KEPT_MAX = 65_536

LimitedBy = Literal["kv", "tpot", "ttft", "seats", "compute"]


@dataclass(frozen=True, slots=True)
class Rate:
    """``limited_by``: what one more request in the batch would break. A rate of 0 has batch 0 and
    the figures of an idle replica: ``limited_by`` is what it misses."""

    requests_per_s: float
    batch: int
    itl_s: float
    ttft_s: float
    limited_by: LimitedBy


def rate(
    model: CostModel,
    *,
    input_tokens: float,
    output_tokens: float,
    ttft_s: float,
    tpot_s: float,
    limits: EngineLimits = DEFAULT_LIMITS,
) -> Rate:
    """Sustainable requests/s of one replica; lengths are means, and are rounded."""
    limits = limits.in_stages(model.shape.pp)
    return _rate(model, Work.of(input_tokens, output_tokens), ttft_s, tpot_s, limits)


@lru_cache(maxsize=RATES_KEPT_MAX)
def _rate(model: CostModel, work: Work, ttft_s: float, tpot_s: float, limits: EngineLimits) -> Rate:
    idle_s = prompt_s(model, work, room=limits.batch_tokens_max)
    if idle_s > ttft_s:
        return Rate(0.0, 0, 0.0, idle_s, "ttft")
    if work.input_tokens + work.output_tokens > model.kv_tokens:
        return Rate(0.0, 0, 0.0, idle_s, "kv")
    if work.output_tokens == 1:
        return Rate(prompts_only_per_s(model, work, limits), 1, 0.0, idle_s, "compute")

    best: Steady | None = None
    limited_by: LimitedBy = "seats"
    low, high = 0, min(limits.running_max, limits.batch_tokens_max - 1)
    while low < high:
        middle = (low + high + 1) // 2
        state = steady(model, middle, work, limits)
        failed = _broken(state, model, ttft_s, tpot_s, limits)
        if failed is None:
            low, best = middle, state
        else:
            high, limited_by = middle - 1, failed
    if best is None:
        return Rate(0.0, 0, 0.0, idle_s, limited_by)
    return Rate(best.requests_per_s, best.batch, best.itl_s, best.ttft_s, limited_by)


def _broken(
    state: Steady, model: CostModel, ttft_s: float, tpot_s: float, limits: EngineLimits
) -> LimitedBy | None:
    """The first bound that ``state`` exceeds. Memory and seats always let a lone request in: it was
    checked to fit to its end; and prompts may always come as fast as they can be computed."""
    crowded = state.batch > 1
    exceeded: tuple[tuple[bool, LimitedBy], ...] = (
        (crowded and state.kv_tokens > model.kv_tokens, "kv"),
        (crowded and state.running > limits.running_max, "seats"),
        (crowded and not state.sustained, "compute"),
        (state.itl_s > tpot_s, "tpot"),
        (state.ttft_s > ttft_s, "ttft"),
    )
    return next((bound for over, bound in exceeded if over), None)
