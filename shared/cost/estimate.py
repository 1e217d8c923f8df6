"""What a user would see of a replica at a given batch: the figures of ``oserve profile show``.

``shared/cost/steady.py`` has the formulas.
"""

from dataclasses import dataclass

from shared.cost.limits import DEFAULT_LIMITS, EngineLimits
from shared.cost.model import CostModel
from shared.cost.steady import Work, batch_max, prompt_s, prompts_only_per_s, steady
from shared.errors import ConfigInvalid


@dataclass(frozen=True, slots=True)
class Estimate:
    """``step_s``: a step in which only ``batch`` requests decode. ``ttft_s``: on an idle replica;
    ``ttft_busy_s``: beside ``batch`` others, rest of the step under way included, no queue.
    ``itl_s``: mean, prompts of those that follow included. ``fits``: KV cache, seats and the step's
    token budget allow the batch; if not, the figures are those of a replica that had the room."""

    batch: int
    step_s: float
    ttft_s: float
    ttft_busy_s: float
    itl_s: float
    tokens_per_s: float
    requests_per_s: float
    batch_max: int
    fits: bool


def estimate(
    model: CostModel,
    *,
    batch: int,
    input_tokens: float,
    output_tokens: float,
    limits: EngineLimits = DEFAULT_LIMITS,
) -> Estimate:
    """Figures for ``batch`` requests of these lengths. With one output token nobody decodes: then
    ``batch`` counts for nothing, and there is no ITL (0)."""
    if batch < 1:
        raise ConfigInvalid(field="batch", value=batch, remedy="use at least 1")
    limits = limits.in_stages(model.shape.pp)
    work = Work.of(input_tokens, output_tokens)
    idle_s = prompt_s(model, work, room=limits.batch_tokens_max)
    most = batch_max(model, work, limits)
    if work.output_tokens == 1:
        requests_per_s = prompts_only_per_s(model, work, limits)
        return Estimate(
            batch=batch,
            step_s=idle_s,
            ttft_s=idle_s,
            ttft_busy_s=idle_s,
            itl_s=0.0,
            tokens_per_s=requests_per_s,
            requests_per_s=requests_per_s,
            batch_max=most,
            fits=most > 0,
        )
    state = steady(model, batch, work, limits)
    return Estimate(
        batch=batch,
        step_s=state.step_s,
        ttft_s=idle_s,
        ttft_busy_s=state.ttft_s,
        itl_s=state.itl_s,
        tokens_per_s=state.requests_per_s * work.output_tokens,
        requests_per_s=state.requests_per_s,
        batch_max=most,
        fits=batch <= most and state.sustained,
    )
