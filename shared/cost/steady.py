"""A replica in its steady state: ``batch`` requests decode, and each that ends is followed by one
whose prompt is computed beside the others (chunked prefill).

With i input and o output tokens for each request, the prompt's last step gives the first token, so
a request decodes for o - 1 steps and holds i + o / 2 tokens on average meanwhile. Of ``batch``
requests a = batch / (o - 1) end in each step, so that a prompts are computed per step. A step has
room for r = batch_tokens_max - batch prompt tokens, and a prompt takes n = ceil(i / r) chunks.

Prompts of one chunk come k at a time, k as good as Poisson with mean a: steps with none, with one,
and with several, for which their mean stands. Prompts of more chunks follow one another: a share
of min(1, a n) steps has a chunk, or more if need be. With the share q of each kind of step

    ITL      = sum of q step
    TTFT     = rest of the step under way + n steps with a full chunk (the last with what is left)
    requests = a / ITL

If a i exceeds r, prompts cannot keep up with ``batch``: it is not sustained, and requests come at
r / i per step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.step import PS_PER_S, Prefill, pairs

BATCHES_KEPT_MAX = 16_384


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks for, on average; whole tokens, at least one of each."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, input_tokens: float, output_tokens: float) -> "Work":
        return cls(max(1, round(input_tokens)), max(1, round(output_tokens)))


@dataclass(frozen=True, slots=True)
class Steady:
    """The steady state at ``batch``; ``running`` counts the requests in prefill, too, ``kv_tokens``
    what all of them hold, in whole blocks. ``sustained``: prompts keep up. ``ttft_s`` is that of a
    request which arrives when the engine is at ``batch`` and has a seat free."""

    batch: int
    step_s: float  # a step in which nobody's prompt is computed
    itl_s: float
    ttft_s: float
    prompt_s: float  # what a prompt takes of steps that are full of prompts
    requests_per_s: float
    running: float
    kv_tokens: float
    sustained: bool


def steady(model: CostModel, batch: int, work: Work, limits: EngineLimits) -> Steady:
    """The steady state of ``batch`` >= 1 requests that decode, each with more than one output
    token. Microseconds, whatever the lengths."""
    assert batch >= 1
    assert work.output_tokens > 1
    room = max(1, limits.batch_tokens_max - batch)
    chunks = math.ceil(work.input_tokens / room)
    context = round(batch * (work.input_tokens + work.output_tokens / 2))
    ends = batch / (work.output_tokens - 1)
    most = room / work.input_tokens  # prompts in a step
    step = itl = model.step.step_ps(batch, context) / PS_PER_S
    square = step**2
    for share, prompts in _kinds_of_steps(min(ends, most), chunks, most):
        prefill = _prefill(work, prompts, chunks)
        mixed = model.step.step_ps(batch, context, prefill) / PS_PER_S
        itl += share * (mixed - step)
        square += share * (mixed**2 - step**2)
    full = model.step.step_ps(batch, context, _prefill(work, most, chunks)) / PS_PER_S
    rest = square / (2 * itl)  # whoever arrives finds long steps more often than short ones
    rounding = (limits.block_tokens - 1) / 2
    prefilling = ends * chunks
    return Steady(
        batch=batch,
        step_s=step,
        itl_s=itl,
        ttft_s=rest + prompt_s(model, work, room=room, batch=batch, context=context),
        prompt_s=full / most,
        requests_per_s=min(ends, most) / itl,
        running=batch + prefilling,
        kv_tokens=batch * (work.input_tokens + work.output_tokens / 2 + rounding)
        + prefilling * (work.input_tokens * (chunks + 1) / (2 * chunks) + rounding),
        sustained=ends <= most and batch < limits.batch_tokens_max,
    )


def prompt_s(model: CostModel, work: Work, *, room: int, batch: int = 0, context: int = 0) -> float:
    """Steps that compute one prompt in chunks of at most ``room`` tokens, beside ``batch`` requests
    that decode and hold ``context`` tokens."""
    full, tokens = divmod(work.input_tokens - 1, room)
    tokens += 1  # of the last chunk
    done = full * room
    last = Prefill(tokens=tokens, chunks=1, pairs=pairs(done, tokens), ending=1)
    total = model.step.step_ps(batch, context, last)
    if full:
        # Pairs count linearly, so the full chunks may share them evenly.
        each = Prefill(tokens=room, chunks=1, pairs=round(pairs(0, done) / full))
        total += full * model.step.step_ps(batch, context, each)
    return total / PS_PER_S


def _kinds_of_steps(ends: float, chunks: int, most: float) -> Iterator[tuple[float, float]]:
    """The steps that have prompts: (share of all steps, prompts in each), ``ends`` prompts per step
    on average and at most ``most`` in one."""
    if chunks > 1:
        busy = min(1.0, ends * chunks)
        yield busy, min(ends / busy, most)
        return
    one = ends * math.exp(-ends)
    if most > 1:  # steps are too few for many with a single prompt, when most are full
        one = min(one, (most - ends) / (most - 1))
    several = ends - one
    yield one, 1.0
    if several > 0:
        share = 1 - math.exp(-ends) - ends * math.exp(-ends)
        mean = min(several / share, most) if share > 0 else 1.0
        yield several / max(mean, 1.0), max(mean, 1.0)


def _prefill(work: Work, prompts: float, chunks: int) -> Prefill:
    """The prompt tokens of a step with ``prompts`` prompts, each in ``chunks`` chunks in all."""
    return Prefill(
        tokens=math.ceil(prompts * work.input_tokens),
        chunks=max(1, round(prompts * chunks)),
        pairs=round(prompts * pairs(0, work.input_tokens)),
        ending=max(1, round(prompts)),
    )


def prompts_only_per_s(model: CostModel, work: Work, limits: EngineLimits) -> float:
    """Requests a second if none decodes (one output token): every step is full of prompts."""
    most = limits.batch_tokens_max / work.input_tokens
    chunks = math.ceil(1 / most)
    return most * PS_PER_S / model.step.step_ps(0, 0, _prefill(work, most, chunks))


@lru_cache(maxsize=BATCHES_KEPT_MAX)
def batch_max(model: CostModel, work: Work, limits: EngineLimits) -> int:
    """The largest batch whose tokens fit the KV cache, and whose requests have seats. 0: not even
    one request fits to its end."""
    if work.input_tokens + work.output_tokens > model.kv_tokens:
        return 0
    if work.output_tokens == 1:
        return min(limits.running_max, model.kv_tokens // work.input_tokens)
    low, high = 0, min(limits.running_max, limits.batch_tokens_max - 1)
    while low < high:
        middle = (low + high + 1) // 2
        state = steady(model, middle, work, limits)
        if state.kv_tokens <= model.kv_tokens and state.running <= limits.running_max:
            low = middle
        else:
            high = middle - 1
    return max(1, low)


@lru_cache(maxsize=BATCHES_KEPT_MAX)
def sustained_max(model: CostModel, work: Work, limits: EngineLimits) -> int:
    """The largest batch with which prompts keep up, memory and seats aside; at least 1."""
    low, high = 1, max(1, min(limits.running_max, limits.batch_tokens_max - 1))
    while low < high:
        middle = (low + high + 1) // 2
        if steady(model, middle, work, limits).sustained:
            low = middle
        else:
            high = middle - 1
    return low
