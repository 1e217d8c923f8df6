"""Latency of one replica at a given load, good enough to rank plans by.

Two queues in a row, each with its textbook approximation:

- Prompts share the engine with decoding and pass one after the other: M/G/1, whose mean wait is
  ``load * s * (1 + cv2) / (2 (1 - load))`` for a mean service time ``s`` (Pollaczek and Khinchine).
- Seats: as many requests decode at a time as KV cache and ``running_max`` allow, for
  ``(o - 1) ITL`` each: M/G/c, whose mean wait is about ``r / c * u ** (sqrt(2 (c + 1)) - 1) /
  (1 - u) * (1 + cv2) / 2`` at utilisation ``u`` (Sakasegawa, 1977; Allen and Cunneen).

The batch that decodes at the load follows from Little's law and the steady state
(``shared/cost/steady.py``): more load, larger batch, longer steps. That batch fluctuates, and since
its rate flattens as it grows, fluctuations lengthen the mean step: by c / D to second order, where
ITL grows by c with each request and D is the step of a lone one (the batch's variance being
B ITL / D, van Kampen's linear noise approximation). Only backlogs of prompts let it drift so far,
hence the share of time in which there are prompts as a weight. Waits are taken to have an
exponential tail, as they do near saturation (Kingman, 1961); the spread of a prompt's own time is
left out, so that the tail is short at low load.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from shared.cost.limits import DEFAULT_LIMITS, EngineLimits
from shared.cost.model import CostModel
from shared.cost.rates import RATES_KEPT_MAX
from shared.cost.steady import Work, batch_max, prompt_s, prompts_only_per_s, steady, sustained_max

TAIL = 0.99
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Latency:
    """Means, and the 99th percentile of TTFT. ``utilisation``: the busier queue's; at 1 or above
    the replica cannot bear the load, and all times are infinite."""

    utilisation: float
    batch: float
    ttft_s: float
    ttft_s_p99: float
    tpot_s: float
    e2e_s: float


def latency(
    model: CostModel,
    *,
    requests_per_s: float,
    input_tokens: float,
    output_tokens: float,
    limits: EngineLimits = DEFAULT_LIMITS,
    cv2: float = 1.0,
) -> Latency:
    """Latency at Poisson arrivals of ``requests_per_s``; ``cv2`` is the squared coefficient of
    variation of the lengths (0: all alike; 1: as an exponential distribution)."""
    limits = limits.in_stages(model.shape.pp)
    return _latency(model, requests_per_s, Work.of(input_tokens, output_tokens), limits, cv2)


@lru_cache(maxsize=RATES_KEPT_MAX)
def _latency(
    model: CostModel, requests_per_s: float, work: Work, limits: EngineLimits, cv2: float
) -> Latency:
    seats = batch_max(model, work, limits)
    if seats == 0:
        return _overloaded(math.inf)
    if work.output_tokens == 1:
        return _prompts_only(model, requests_per_s, work, limits, cv2)
    state = _operating_point(model, requests_per_s, work, limits, seats)
    if state.requests_per_s < requests_per_s * (1 - ROUNDING):
        return _overloaded(requests_per_s / state.requests_per_s)
    load, used = requests_per_s * state.prompt_s, state.batch / seats
    busier = max(load, used)
    if busier >= 1:
        return _overloaded(busier)
    lone_s = steady(model, 1, work, limits).step_s
    slope_s = max(0.0, state.itl_s - lone_s) / max(1.0, state.batch)
    tpot_s = state.itl_s * (1 + load * slope_s / lone_s)
    decode_s = (work.output_tokens - 1) * tpot_s
    wait_s = _prompt_wait_s(load, state.prompt_s, cv2) + _seat_wait_s(used, seats, decode_s, cv2)
    ttft_s = state.ttft_s + wait_s
    return Latency(
        utilisation=busier,
        batch=state.batch,
        ttft_s=ttft_s,
        ttft_s_p99=state.ttft_s + _tail_s(wait_s, busier),
        tpot_s=tpot_s,
        e2e_s=ttft_s + decode_s,
    )


@dataclass(frozen=True, slots=True)
class _Point:
    """The steady state in which as many requests come as are asked for, or the fullest there is."""

    batch: float
    requests_per_s: float
    itl_s: float
    ttft_s: float
    prompt_s: float


def _operating_point(
    model: CostModel, requests_per_s: float, work: Work, limits: EngineLimits, seats: int
) -> _Point:
    """Between the two whole batches around it, as their rates interpolate."""
    low, high = 1, min(seats, sustained_max(model, work, limits))
    while low < high:
        middle = (low + high) // 2
        if steady(model, middle, work, limits).requests_per_s >= requests_per_s:
            high = middle
        else:
            low = middle + 1
    above = steady(model, high, work, limits)
    if high > 1:
        state = steady(model, high - 1, work, limits)
        below = _Point(high - 1, state.requests_per_s, state.itl_s, state.ttft_s, state.prompt_s)
    else:  # an idle replica: the next request decodes alone
        idle_s = prompt_s(model, work, room=limits.batch_tokens_max)
        below = _Point(0, 0.0, above.step_s, idle_s, above.prompt_s)
    gap = above.requests_per_s - below.requests_per_s
    share = (requests_per_s - below.requests_per_s) / gap if gap > 0 else 1.0
    share = min(1.0, max(0.0, share))

    def between(one: float, other: float) -> float:
        return one + (other - one) * share

    return _Point(
        batch=between(below.batch, above.batch),
        requests_per_s=between(below.requests_per_s, above.requests_per_s),
        itl_s=between(below.itl_s, above.itl_s),
        ttft_s=between(below.ttft_s, above.ttft_s),
        prompt_s=between(below.prompt_s, above.prompt_s),
    )


def _prompts_only(
    model: CostModel, requests_per_s: float, work: Work, limits: EngineLimits, cv2: float
) -> Latency:
    """Nobody decodes: one queue, for the step's token budget."""
    service_s = 1 / prompts_only_per_s(model, work, limits)
    load = requests_per_s * service_s
    if load >= 1:
        return _overloaded(load)
    served_s = prompt_s(model, work, room=limits.batch_tokens_max)
    wait_s = _prompt_wait_s(load, service_s, cv2)
    return Latency(
        utilisation=load,
        batch=0.0,
        ttft_s=served_s + wait_s,
        ttft_s_p99=served_s + _tail_s(wait_s, load),
        tpot_s=0.0,
        e2e_s=served_s + wait_s,
    )


def _prompt_wait_s(load: float, service_s: float, cv2: float) -> float:
    return load * service_s * (1 + cv2) / (2 * (1 - load))


def _seat_wait_s(used: float, seats: int, held_s: float, cv2: float) -> float:
    busy = used ** (math.sqrt(2 * (seats + 1)) - 1)
    return held_s / seats * busy / (1 - used) * (1 + cv2) / 2


def _tail_s(wait_s: float, busy: float) -> float:
    """The 99th percentile of a wait that is 0 but for a share ``busy``, and exponential there."""
    if busy <= 1 - TAIL:
        return 0.0
    return wait_s / busy * math.log(busy / (1 - TAIL))


def _overloaded(utilisation: float) -> Latency:
    never = math.inf
    return Latency(max(1.0, utilisation), never, never, never, never, never)
