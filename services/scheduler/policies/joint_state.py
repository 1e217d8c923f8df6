"""A steady state of a replica as distributions of TTFT and TPOT; ``joint_steady`` says of what."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1, sqrt

from services.scheduler.policies.rehearsal_requests import SPREAD_LN

Z99 = 2.326  # of a normal distribution
SPREAD_SQUARES = exp(SPREAD_LN**2)  # mean square of a length over its squared mean
# Fitted, each to the one figure that hangs on it most; 1 is what the theory says.
DRIFT = 2.0  # how much the batch's ups and downs lengthen the mean step
BATCH_VARIANCE = 1.5
PROMPTS_VARIANCE = 1.3
WAIT_VARIANCE = 1.2


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of one of the ``POINTS``: the steps it takes, how long these are, and how much of
    that is added by it."""

    weight: float
    steps: int
    took_s: float
    extra_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A replica at ``batch``. ``added``: of all time, what prompts add; ``together``: prompts in a
    step that has any, each of which adds ``part`` of what it would alone; ``longest_s``: a step
    full of prompts, which no TPOT exceeds; ``slope_s``: how ITL grows with the batch; ``stay_s``:
    for how long the batch remembers; ``seat_s``: the wait for a seat."""

    batch: float
    step_s: float
    lone_s: float
    itl_s: float
    longest_s: float
    slope_s: float
    stay_s: float
    seat_s: float
    added: float
    together: float
    part: float
    loads: Sequence[Load]
    prompts: Sequence[Sequence[Prompt]]

    def moment(self, power: int) -> float:
        """Of what a prompt adds, times arrivals."""
        return sum(
            load.arrivals_rps * sum(p.weight * (p.extra_s * self.part) ** power for p in own)
            for load, own in zip(self.loads, self.prompts, strict=True)
        )

    def wait_s(self) -> tuple[float, float]:
        """Mean and variance of the time until a prompt's first step."""
        full_s = squares = 0.0
        for load, own in zip(self.loads, self.prompts, strict=True):
            full_s += load.arrivals_rps * sum(p.weight * p.took_s for p in own)
            squares += load.arrivals_rps * sum(p.weight * p.took_s**2 for p in own)
        idle = 1.0 - min(1.0, full_s)
        rest_s = idle * min(1.0, self.batch) * self.step_s / 2 + squares * self.part**2 / 2
        queue_s = rest_s / (1.0 - self.added)
        variance = WAIT_VARIANCE * queue_s**2 + self.moment(3) / (3.0 * (1.0 - self.added))
        return queue_s + self.seat_s, variance + 2.0 * self.seat_s**2

    def tails(self, utilisation: float) -> list[Tail]:
        """The times of each type, in their order."""
        wait = self.wait_s()
        return [
            self._tail(load, own, wait, utilisation)
            for load, own in zip(self.loads, self.prompts, strict=True)
        ]

    def _tail(
        self, load: Load, own: Sequence[Prompt], wait: tuple[float, float], utilisation: float
    ) -> Tail:
        wait_s, wait_variance = wait
        took_s = sum(p.weight * p.took_s for p in own)
        spread = sum(p.weight * p.took_s**2 for p in own) - took_s**2
        arrivals = sum(each.arrivals_rps for each in self.loads)
        others_s = (self.together - 1.0) * self.moment(1) / arrivals / 2
        ttft_s = wait_s + took_s + others_s
        variance = wait_variance + max(0.0, spread) + others_s**2
        tpot_s, tpot_variance = self._tpot_s(load)
        return Tail(
            ttft_s=_quantile(ttft_s, variance, Z99),
            tpot_s=min(self.longest_s, _quantile(tpot_s, tpot_variance, Z99)),
            utilisation=utilisation,
            ttft_s_mean=ttft_s,
            ttft_s_p50=_quantile(ttft_s, variance, 0.0),
            tpot_s_mean=tpot_s,
            tpot_s_p50=_quantile(tpot_s, tpot_variance, 0.0),
        )

    def _tpot_s(self, load: Load) -> tuple[float, float]:
        """Mean and variance. A request of short answers sees the batch of a moment and the prompts
        of few others, a long one the average of both."""
        if load.gaps == 0.0:
            return 0.0, 0.0
        drift = self.added * max(0.0, self.itl_s - self.lone_s) / self.lone_s
        drift = DRIFT * drift / max(1.0, self.batch)
        mean_s = min(self.longest_s, self.itl_s * (1.0 + drift))
        times = load.gaps * self.itl_s / self.stay_s
        evened = 2.0 * (times + expm1(-times)) / times**2
        batch = BATCH_VARIANCE * self.slope_s**2 * self.batch * evened
        prompts = self.itl_s * self.moment(2) / load.gaps * SPREAD_SQUARES / (1.0 - self.added)
        return mean_s, batch + PROMPTS_VARIANCE * prompts


def _quantile(mean: float, variance: float, z: float) -> float:
    """Of a gamma distribution, where a normal one has ``z`` (Wilson and Hilferty, 1931)."""
    if variance <= 0.0 or mean <= 0.0:
        return max(0.0, mean)
    part = variance / mean**2 / 9.0
    return mean * max(0.0, 1.0 - part + z * sqrt(part)) ** 3
