"""Predicted TTFT and TPOT of each type on a replica that serves a mix of them: mean, median, tail.

``shared/cost/latency.py`` answers for one length at a stable load. Here types are told apart, and
times get a distribution. With S the step of the B requests that decode, every prompt adds x to the
steps it is in, beyond what they would have taken anyway; prompts that share a step add less each.

    ITL   S / (1 - sum of arrivals * x), and a little more, since B varies and its steps with it
    B     ITL * sum of arrivals * (outputs - 1)                                (Little's law)
    TTFT  wait + own prompt + half of what others bring into its steps
    wait  (rest of the step under way) / (1 - sum of arrivals * x)             (Pollaczek, Khinchine)
          + wait for a seat, or KV (Sakasegawa)

and variances of

    TTFT  the wait's, as if it were exponential, and its third-moment term; own prompt's
    TPOT  that of B, by how much a request's own time of decoding evens it out (correlated over the
          time that requests stay); that of the prompts which come meanwhile (compound Poisson)

Quantiles are those of a gamma distribution of that mean and variance, by the approximation of
Wilson and Hilferty. Lengths within a type are log-normal, three points of them standing for all
(Gauss and Hermite). Factors that theory does not give were fitted to rehearsals of 260 plans;
``python -m loadgen.bench.bench_predictions`` compares the outcome with the simulator.

Near and above saturation nothing is stationary within a horizon H. The stationary part is taken at
``FULL`` load then. The wait stays below 2.33 sqrt(H / arrivals), the spread of what arrives in H, plus
what piles up by its middle, H / 2 * (utilisation - 1). So lateness is finite, rises with load, and
overloads can be compared.

Arrivals are taken to be Poisson: bursts make it optimistic. It ranks plans; a rehearsal plays
the best of them through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, expm1, floor, isfinite, sqrt

from services.scheduler.policies.rehearsal_requests import SPREAD_LN
from shared.cost.latency import latency
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.steady import Work, batch_max, prompt_s
from shared.cost.step import PS_PER_S, Prefill

Z99 = 2.326  # of a normal distribution
UTILISATION_MAX = 1e6  # "infinitely" overloaded, as a number
FULL = 0.95  # the load above which waits are no longer those of a steady state
EXTRA_MAX = 0.97  # of all time, that prompts add
SPREAD_SQUARES = exp(SPREAD_LN**2)  # mean square of a length over its squared mean
POINTS = tuple(
    (weight, exp(k * sqrt(3.0) * SPREAD_LN - SPREAD_LN**2 / 2))
    for weight, k in ((1 / 6, -1), (2 / 3, 0), (1 / 6, 1))
)
# Fitted, each to the one figure that hangs on it most; 1 is what the theory says.
DRIFT = 2.0  # how much the batch's ups and downs lengthen the mean step
BATCH_VARIANCE = 1.5
PROMPTS_VARIANCE = 1.3
WAIT_VARIANCE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one replica gets of one type; ``arrivals_rps`` above 0."""

    arrivals_rps: float
    input_tokens: float
    output_tokens: float

    @property
    def gaps(self) -> float:
        return max(0.0, self.output_tokens - 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Seconds; ``ttft_s`` and ``tpot_s`` are 99th percentiles. ``utilisation`` is the replica's,
    and may exceed 1."""

    ttft_s: float
    tpot_s: float
    utilisation: float
    ttft_s_mean: float
    ttft_s_p50: float
    tpot_s_mean: float
    tpot_s_p50: float


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
        cv2=1.0,
    )
    limits = limits.in_stages(model.shape.pp)
    seats = max(1, batch_max(model, mean, limits))
    utilisation = min(found.utilisation, UTILISATION_MAX)
    eased = min(1.0, FULL / utilisation) if utilisation > 0 else 1.0
    part = [replace(load, arrivals_rps=eased * load.arrivals_rps) for load in loads]
    start = found.batch if isfinite(found.ttft_s) else FULL * seats
    state = _Replica(model, part, limits).state(start, seats)
    steady = [state.tail(load, own) for load, own in zip(part, state.prompts, strict=True)]
    if utilisation <= FULL:
        return [_bounded(tail, arrivals, horizon_s, utilisation) for tail in steady]
    return [_unsteady(tail, arrivals, horizon_s, utilisation) for tail in steady]
