"""Predicted 99th-percentile TTFT and TPOT of a replica under a load: a queueing view of the engine.

An engine decodes all running requests in each step and spends what is left of the step's token
budget on prompts. With T(B) the time of a decode step of B requests, L output tokens/s asked for,
and r the time per second that prompts add to steps:

    TPOT       T(B) / (1 - r), since prompts take their time out of every second
    B          L * TPOT (Little): running requests
    load       L * T(B_max) / B_max + r, with B_max what the KV cache or the engine's limits allow

Tails, each from a textbook limit rather than from fitted constants:

- Running requests are about Poisson (infinite-server queue), so B99 = B + 2.33 sqrt(B): one large
  replica varies less than the many small ones it replaces.
- A prompt waits for the prompts before it as in M/G/1: P(wait > t) = r exp(-t (1 - r) / R), R the
  mean residual prompt, then for its own steps, beside the step that runs when it arrives.
- A request waits for a slot as in M/M/c with c = B_max: P(wait) is about load ** (sqrt(2 (c + 1)) - 1)
  (Sakasegawa, 1977), exponential beyond. Near and above saturation nothing is stationary: within a
  horizon H the wait stays below 2.33 sqrt(H / arrivals), the spread of what arrives in H, plus
  what piles up on average, H / 2 * (load - 1).

It assumes Poisson arrivals and lengths near their type's means; bursts and long tails within a type
make it optimistic. It ranks plans; the simulator says what they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Protocol

from shared.cost.limits import EngineLimits
from shared.cost.step import PS_PER_S, Prefill, pairs

Z99 = 2.326  # of a normal distribution
RARE = 0.01
BISECTIONS = 24
PROMPT_LOAD_MAX = 0.99  # beyond, prompts alone take all time: the wait is that of overload


class StepTimes(Protocol):
    """The part of ``shared.cost.step.StepModel`` that is needed."""

    def step_ps(self, batch: int, context: int, prefill: Prefill = ...) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one replica gets of one type."""

    arrivals_rps: float
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """99th percentiles; ``load`` of the replica, 1 at saturation."""

    ttft_s: float
    tpot_s: float
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Its step times, and how many tokens of KV cache it holds."""

    step: StepTimes
    kv_tokens: int
    limits: EngineLimits

    def tails(self, loads: Sequence[Load], *, horizon_s: float) -> list[Tail]:
        """Of each type in ``loads``; types without arrivals are judged as one more request."""
        flow = _Stream(self, loads)
        load = flow.load
        running = flow.running() if load < 1.0 else flow.slots
        bursty = min(flow.slots, running + Z99 * sqrt(running))
        tpot_s = self.decode_s(bursty, flow.context) / (1.0 - flow.busy(bursty))
        slot_s = flow.slot_wait_s(load, horizon_s, tpot_s)
        prompt_s = flow.prompt_wait_s(bursty)
        step_s = self.decode_s(running, flow.context)
        return [
            Tail(
                ttft_s=step_s + slot_s + prompt_s + self.prompt_s(kind, bursty, flow.context),
                tpot_s=tpot_s,
                load=load,
            )
            for kind in loads
        ]

    def decode_s(self, running: float, context: float) -> float:
        """A step in which ``running`` requests of ``context`` tokens each decode."""
        batch = max(1, round(running))
        return self.step.step_ps(batch, round(batch * context)) / PS_PER_S

    def prompt_s(self, kind: Load, running: float, context: float) -> float:
        """The steps that compute one prompt beside ``running`` decoding requests."""
        batch = round(running)
        tokens = max(1, round(kind.input_tokens))
        room = max(1, self.limits.batch_tokens_max - batch)
        chunks = ceil(tokens / room)
        attended = pairs(0, tokens) // chunks
        chunk = Prefill(tokens=ceil(tokens / chunks), chunks=1, pairs=attended, ending=1)
        return chunks * self.step.step_ps(batch, round(batch * context), chunk) / PS_PER_S


class _Stream:
    """All types of one replica together."""

    def __init__(self, replica: Replica, loads: Sequence[Load]) -> None:
        self._replica, self._loads = replica, [kind for kind in loads if kind.arrivals_rps > 0]
        self.arrivals = sum(kind.arrivals_rps for kind in self._loads)
        kinds = self._loads or list(loads)
        outputs = [max(1.0, kind.output_tokens) for kind in kinds]
        rates = [kind.arrivals_rps if self._loads else 1.0 for kind in kinds]
        asked = sum(rate * output for rate, output in zip(rates, outputs, strict=True))
        held = sum(
            rate * output * (kind.input_tokens + output / 2)
            for kind, rate, output in zip(kinds, rates, outputs, strict=True)
        )
        self.context = held / asked  # tokens of a running request, half of its output included
        self._output_rate = asked if self._loads else 0.0
        limits = replica.limits
        self.slots = max(1.0, min(float(limits.running_max), replica.kv_tokens / self.context))
        share = self._added(self.slots)
        full_s = replica.decode_s(self.slots, self.context)
        self.load = self._output_rate * full_s / self.slots + share

    def busy(self, running: float) -> float:
        """Share of time that prompts add to steps, kept below 1."""
        return min(PROMPT_LOAD_MAX, self._added(running))

    def running(self) -> float:
        """Requests that decode at a time: where B = L T(B) / (1 - r(B)); found by bisection."""
        low, high = 0.0, self.slots
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            step_s = self._replica.decode_s(middle, self.context)
            if self._output_rate * step_s / (1.0 - self.busy(middle)) > middle:
                low = middle
            else:
                high = middle
        return high

    def prompt_wait_s(self, running: float) -> float:
        """M/G/1: for the prompts that came before, as far as they lengthen steps."""
        times = self._prompts(running)
        mean_s = sum(rate * time_s for rate, time_s in times)
        work = min(PROMPT_LOAD_MAX, mean_s)
        if work <= RARE:
            return 0.0
        residual_s = sum(rate * time_s * time_s for rate, time_s in times) / (2 * mean_s)
        return residual_s / (1.0 - work) * log(work / RARE)

    def slot_wait_s(self, load: float, horizon_s: float, tpot_s: float) -> float:
        """M/M/c for a place in the batch, or what piles up within the horizon."""
        if not self._loads:
            return 0.0
        spread_s = Z99 * sqrt(horizon_s / self.arrivals)
        if load >= 1.0:
            return spread_s + horizon_s / 2 * (load - 1.0)
        chance = load ** (sqrt(2 * (self.slots + 1)) - 1)
        if chance <= RARE:
            return 0.0
        resident_s = self._output_rate / self.arrivals * tpot_s
        return min(spread_s, resident_s / (self.slots * (1.0 - load)) * log(chance / RARE))

    def _added(self, running: float) -> float:
        return sum(rate * time_s for rate, time_s in self._prompts(running))

    def _prompts(self, running: float) -> list[tuple[float, float]]:
        """(prompts/s, seconds that each adds to the steps it is computed in) by type."""
        step_s = self._replica.decode_s(running, self.context) if running >= 1 else 0.0
        found: list[tuple[float, float]] = []
        for kind in self._loads:
            chunks = ceil(kind.input_tokens / self._replica.limits.batch_tokens_max)
            spent_s = self._replica.prompt_s(kind, running, self.context)
            found.append((kind.arrivals_rps, max(0.0, spent_s - chunks * step_s)))
        return found
