"""A replica that serves a mix of types in its steady state: TTFT and TPOT as distributions.

``shared/cost/latency.py`` answers for requests of one length, and for means. Here types are told
apart. With S the step of the B requests that decode, every prompt adds x to the steps it is in,
beyond what they would have taken anyway; prompts that share a step add less each.

    ITL   S / (1 - sum of arrivals * x), and a little more, since B varies and its steps with it
    B     ITL * sum of arrivals * (outputs - 1)                                (Little's law)
    TTFT  wait + own prompt + half of what others bring into its steps
    wait  (rest of the step under way) / (1 - sum of arrivals * x)   (Pollaczek and Khinchine)
          + wait for a seat, or KV                                   (Sakasegawa)

and variances of

    TTFT  the wait's, as if it were exponential, and its third-moment term; own prompt's
    TPOT  that of B, by how much a request's own time of decoding evens it out (correlated over the
          time that requests stay); that of the prompts which come meanwhile (compound Poisson)

Quantiles are those of a gamma distribution of that mean and variance, by the approximation of
Wilson and Hilferty. Lengths within a type are log-normal, three points of them standing for all
(Gauss and Hermite). Factors that theory does not give were fitted to rehearsals of 260 plans;
``python -m loadgen.bench.bench_predictions`` compares the outcome with the simulator.
"""

from collections.abc import Sequence
from math import ceil, exp, expm1, floor, sqrt

from services.scheduler.policies.joint_state import SPREAD_SQUARES, Load, Prompt, State
from services.scheduler.policies.rehearsal_requests import SPREAD_LN
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.cost.steady import Work, prompt_s
from shared.cost.step import PS_PER_S, Prefill

EXTRA_MAX = 0.97  # of all time, that prompts add
CLOSE = 0.02  # of the batch: nearer to the steady state than that is near enough
FEW, HALF = 0.1, 0.5  # of all time, that prompts add
ROUNDS = 5  # each at least halves what is off
ALONE = 1e-6  # prompts that come during a step: fewer never share one
POINTS = tuple(
    (weight, exp(k * sqrt(3.0) * SPREAD_LN - SPREAD_LN**2 / 2))
    for weight, k in ((1 / 6, -1), (2 / 3, 0), (1 / 6, 1))
)


class SteadyReplica:
    """The steady states of a replica under ``loads``; ``limits`` are those of all its stages."""

    def __init__(self, model: CostModel, loads: Sequence[Load], limits: EngineLimits) -> None:
        self._model, self._loads, self._limits = model, loads, limits
        self._decoded = sum(load.arrivals_rps * load.gaps for load in loads)  # tokens/s
        held = sum(
            load.arrivals_rps * load.gaps * (load.input_tokens + load.output_tokens / 2)
            for load in loads
        )
        self._context = held / self._decoded if self._decoded else 0.0
        self._prompted = sum(load.arrivals_rps * load.input_tokens for load in loads)
        squares = sum(load.arrivals_rps * load.input_tokens**2 for load in loads)
        self._pairs = squares * SPREAD_SQUARES / 2 / self._prompted  # of each prompt token
        block = (limits.block_tokens - 1) / 2
        self._seats = max(
            1, min(limits.running_max, int(model.kv_tokens / max(1.0, self._context + block)))
        )
        self._full = self._prompts_of(self._seats if self._decoded else 0)

    def utilisation(self) -> float:
        """The share of all time that the load takes at its most efficient, with every seat taken
        and every step full of prompts."""
        batch = self._seats if self._decoded else 0
        step_s = self._step_s(max(1, batch))
        added, steps = self._sums(self._full)
        part, _ = self._shared(batch, steps, float("inf"), step_s)
        added = max(added * part, self._least_added(batch, step_s))
        return self._decoded * step_s / self._seats + added

    def state(self) -> State:
        """The one in which the batch is what arrives of it, within the seats there are; by two
        steps of the secant method, from where it would be if steps grew evenly with it."""
        if not self._decoded:
            return self._at(0.0)
        seats = float(self._seats)
        lone_s, full_s = self._step_s(1), self._step_s(self._seats)
        grows_s = (full_s - lone_s) / max(1.0, seats - 1.0)
        idle = 1.0 - min(EXTRA_MAX, self._sums(self._full)[0]) - self._decoded * grows_s
        start = self._decoded * lone_s / idle if idle > 0 else seats
        one = self._at(min(start, seats))
        two = self._at(min(self._decoded * one.itl_s, seats))
        off, further = (self._decoded * each.itl_s - each.batch for each in (one, two))
        if abs(further) <= CLOSE * max(1.0, two.batch) or off == further:
            return two
        batch = two.batch + further * (two.batch - one.batch) / (off - further)
        return self._at(min(max(batch, 0.0), seats))

    def _step_s(self, batch: int) -> float:
        return self._model.step.step_ps(batch, round(batch * self._context)) / PS_PER_S

    def _prompts_of(self, batch: int) -> list[list[Prompt]]:
        step_s = self._step_s(max(1, batch))
        return [self._prompts(load, batch, step_s) for load in self._loads]

    def _sums(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[float, float]:
        """Of all time, what prompts add when each has its steps alone; and steps with any, per
        second."""
        added = steps = 0.0
        for load, own in zip(self._loads, prompts, strict=True):
            added += load.arrivals_rps * sum(p.weight * p.extra_s for p in own)
            steps += load.arrivals_rps * sum(p.weight * p.steps for p in own)
        return added, steps

    def _at(self, batch: float) -> State:
        whole = round(batch)
        step_s, seats = self._step_s(max(1, whole)), self._seats
        prompts = self._prompts_of(whole)
        added, steps = self._sums(prompts)
        itl_s, part, together = self._shared_step(whole, steps, added, step_s)
        longest_s = max(step_s, self._full_s(whole))
        itl_s = min(itl_s, longest_s)
        wide = max(1, round(sqrt(max(batch, 1.0))))
        low, high = max(1, whole - wide), max(2, whole + wide)
        slope_s = (self._step_s(high) - self._step_s(low)) / (high - low) * itl_s / step_s
        squares = sum(load.arrivals_rps * load.gaps**2 for load in self._loads) * SPREAD_SQUARES
        arrivals = sum(load.arrivals_rps for load in self._loads)
        return State(
            batch=batch,
            step_s=step_s,
            lone_s=self._step_s(1),
            itl_s=itl_s,
            longest_s=longest_s,
            slope_s=slope_s,
            stay_s=squares / self._decoded * itl_s if self._decoded else 0.0,
            seat_s=_seat_s(min(EXTRA_MAX, batch / seats), seats, self._decoded * itl_s / arrivals),
            added=min(EXTRA_MAX, added * part),
            together=together,
            part=part,
            loads=self._loads,
            prompts=prompts,
        )

    def _shared_step(
        self, batch: int, steps_per_s: float, added: float, step_s: float
    ) -> tuple[float, float, float]:
        """ITL, and what ``_shared`` says at it. A longer step is shared by more prompts, each of
        which adds less: the fixed point is sought by geometric means, which close in on it."""
        itl_s, part, together = step_s / (1.0 - min(HALF, added)), 1.0, 1.0
        least = self._least_added(batch, step_s) / added if added >= FEW else 0.0
        for _ in range(1 if added < FEW else ROUNDS):
            part, together = self._shared(batch, steps_per_s, itl_s, step_s)
            part = min(1.0, max(part, least))
            itl_s = sqrt(itl_s * step_s / (1.0 - min(EXTRA_MAX, added * part)))
        return itl_s, part, together

    def _prompts(self, load: Load, batch: int, step_s: float) -> list[Prompt]:
        """What prompts of the type take beside ``batch`` requests that decode."""
        room = max(1, self._limits.batch_tokens_max - batch)
        context = round(batch * self._context)
        found: list[Prompt] = []
        for weight, times in POINTS:
            work = Work.of(times * load.input_tokens, 1)
            steps = ceil(work.input_tokens / room)
            took_s = prompt_s(self._model, work, room=room, batch=batch, context=context)
            anyway_s = steps * step_s if batch else 0.0
            found.append(Prompt(weight, steps, took_s, max(0.0, took_s - anyway_s)))
        return found

    def _shared(
        self, batch: int, steps_per_s: float, itl_s: float, step_s: float
    ) -> tuple[float, float]:
        """What a prompt adds to a step that it shares with those that come during another, as a
        part of what it adds alone; and how many share it."""
        room = max(1, self._limits.batch_tokens_max - batch)
        tokens = min(float(room), self._prompted / steps_per_s)
        coming = steps_per_s * itl_s
        most = room / tokens
        together = min(most, coming / -expm1(-coming)) if coming > ALONE else 1.0
        together = max(1.0, together)
        anyway_s = step_s if batch else 0.0
        alone_s = self._mixed_s(batch, 1, tokens) - anyway_s
        if together == 1.0 or alone_s <= 0.0:
            return 1.0, together
        below = floor(together)
        share = together - below
        several_s = (1.0 - share) * self._mixed_s(batch, below, tokens)
        if share:
            several_s += share * self._mixed_s(batch, below + 1, tokens)
        return min(1.0, max(0.0, several_s - anyway_s) / (together * alone_s)), together

    def _least_added(self, batch: int, step_s: float) -> float:
        """Of all time, what prompts add if every step that has any is full of them."""
        room = max(1, self._limits.batch_tokens_max - batch)
        anyway_s = step_s if batch else 0.0
        return self._prompted / room * max(0.0, self._full_s(batch) - anyway_s)

    def _full_s(self, batch: int) -> float:
        """The longest step: the room that ``batch`` requests leave is full of prompts."""
        room = max(1, self._limits.batch_tokens_max - batch)
        arrivals = sum(load.arrivals_rps for load in self._loads)
        prompts = max(1, round(arrivals * room / self._prompted))
        return self._mixed_s(batch, prompts, room / prompts)

    def _mixed_s(self, batch: int, prompts: int, tokens: float) -> float:
        """A step with ``prompts`` prompts of ``tokens`` tokens, all in one chunk each."""
        work = Prefill(
            round(prompts * tokens), prompts, round(prompts * tokens * self._pairs), prompts
        )
        context = round(batch * self._context)
        return self._model.step.step_ps(batch, context, work) / PS_PER_S


def _seat_s(used: float, seats: int, held_s: float) -> float:
    """The mean wait for one of ``seats`` seats, each held for ``held_s``: M/G/c (Sakasegawa, 1977;
    Allen and Cunneen)."""
    busy = used ** (sqrt(2.0 * (seats + 1)) - 1.0)
    return held_s / seats * busy / (1.0 - used) * (1.0 + SPREAD_SQUARES) / 2
