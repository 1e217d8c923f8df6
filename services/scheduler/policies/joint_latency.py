"""Predicted 99th-percentile TTFT and TPOT of each type on a replica that serves a mix of them.

``shared/cost/latency.py`` answers for one length at a stable load. Here

- the mix counts as its mean request, with the squared coefficient of variation of the lengths
  between types put on top of an exponential one within each;
- a type's own prompt takes longer or shorter than the mean one, which shifts its TTFT;
- requests that run at a time are about Poisson (infinite-server queue), so that TPOT is taken at
  B + 2.33 sqrt(B): one large replica varies less than the many small ones it replaces;
- near and above saturation nothing is stationary within a horizon H. The wait then stays below
  2.33 sqrt(H / arrivals), the spread of what arrives in H, plus what piles up by its middle,
  H / 2 * (utilisation - 1). So lateness is finite, rises with load, and overloads can be compared.

Arrivals are taken to be Poisson: bursts make it optimistic. It ranks plans; the simulator says what
they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, sqrt

from shared.cost.latency import latency
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.steady import Work, batch_max, prompt_s, steady

Z99 = 2.326  # of a normal distribution
UTILISATION_MAX = 1e6  # "infinitely" overloaded, as a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one replica gets of one type; ``arrivals_rps`` above 0."""

    arrivals_rps: float
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """99th percentiles; ``utilisation`` is the replica's, and may exceed 1."""

    ttft_s: float
    tpot_s: float
    utilisation: float


def tails(
    model: CostModel, loads: Sequence[Load], limits: EngineLimits, *, horizon_s: float
) -> list[Tail]:
    """One for each of ``loads``, in their order; all together are the replica's load."""
    arrivals = sum(load.arrivals_rps for load in loads)
    mean = _mean(loads, arrivals)
    found = latency(
        model,
        requests_per_s=arrivals,
        input_tokens=mean.input_tokens,
        output_tokens=mean.output_tokens,
        limits=limits,
        cv2=1.0 + 2.0 * _spread_between(loads, arrivals),
    )
    limits = limits.in_stages(model.shape.pp)
    seats = max(1, batch_max(model, mean, limits))
    stable = isfinite(found.ttft_s)
    busy = min(seats, ceil(found.batch + Z99 * sqrt(found.batch))) if stable else seats
    tpot_s, served_s = _at(model, max(1, busy), mean, limits)
    worst_s = served_s + Z99 * sqrt(horizon_s / arrivals)
    if stable:
        ttft_s = min(found.ttft_s_p99, worst_s)
    else:
        over = min(found.utilisation, UTILISATION_MAX) - 1.0
        ttft_s = worst_s + horizon_s / 2 * max(0.0, over)
    own = [prompt_s(model, _work(load), room=limits.batch_tokens_max) for load in loads]
    usual = prompt_s(model, mean, room=limits.batch_tokens_max)
    return [
        Tail(
            ttft_s=max(prompt, ttft_s + prompt - usual),
            tpot_s=tpot_s,
            utilisation=found.utilisation,
        )
        for prompt in own
    ]


def _at(model: CostModel, batch: int, mean: Work, limits: EngineLimits) -> tuple[float, float]:
    """TPOT, and TTFT of a request that finds a seat, beside ``batch`` others."""
    if mean.output_tokens == 1:
        return 0.0, prompt_s(model, mean, room=limits.batch_tokens_max)
    state = steady(model, batch, mean, limits)
    return state.itl_s, state.ttft_s


def _work(load: Load) -> Work:
    return Work.of(load.input_tokens, load.output_tokens)


def _mean(loads: Sequence[Load], arrivals: float) -> Work:
    inputs = sum(load.arrivals_rps * load.input_tokens for load in loads)
    outputs = sum(load.arrivals_rps * load.output_tokens for load in loads)
    return Work.of(inputs / arrivals, outputs / arrivals)


def _spread_between(loads: Sequence[Load], arrivals: float) -> float:
    """Squared coefficient of variation of the types' lengths: inputs' or outputs', the larger."""
    spreads: list[float] = []
    for lengths in (
        [load.input_tokens for load in loads],
        [max(1.0, load.output_tokens) for load in loads],
    ):
        weighted = list(zip(loads, lengths, strict=True))
        mean = sum(load.arrivals_rps * size for load, size in weighted) / arrivals
        square = sum(load.arrivals_rps * size * size for load, size in weighted) / arrivals
        spreads.append(max(0.0, square / (mean * mean) - 1.0))
    return max(spreads)
