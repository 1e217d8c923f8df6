"""Times an engine's steps: every scenario once for warming up, then in rounds until time is up.

The rounds interleave all scenarios, so that a busy spell of the machine falls on all kinds of steps
alike; a row is a quantile of its samples: the median, or a lower one where most are disturbed.
What would not leave time for enough rounds is left out, the last scenarios first, and said.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from services.worker.engine.interface import EngineRequest
from services.worker.measure.ledger import Ledger, StepShape, SweepFailed
from services.worker.measure.stopwatch import stopwatch
from services.worker.measure.target import Target
from shared.messages.requests import SamplingParams

OUTPUT_TOKENS_MAX = 160
"""Given to each request: more than any scenario decodes of one."""
ROUNDS_MIN = 5
SAMPLES_MIN = 3

Clock = Callable[[], float]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One step shape and its time, a quantile of its samples. ``origin`` names the scenario that
    met it."""

    shape: StepShape
    time_s: float
    samples: int
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Steps worth timing. ``tokens`` is roughly how many it computes, ``needed``: no fit can do
    without it, ``held_out``: its rows only judge the fit."""

    name: str
    tokens: int
    run: "Callable[[Bench], None]"
    needed: bool = False
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Sweep:
    rows: list[Row]
    rounds: int
    seconds: float
    quantile: float
    skipped: list[str] = field(default_factory=list[str])


class _OutOfTime(Exception):
    """The scenario would run past its deadline."""


class Bench:
    """What a scenario does to the engine. Notes the time of each step under its shape."""

    def __init__(self, target: Target, clock: Clock, watch: Clock) -> None:
        """``clock`` is for deadlines, ``watch`` for steps."""
        self._target, self._clock, self._watch = target, clock, watch
        self._ledger = Ledger(batch_tokens_max=target.batch_tokens_max)
        self._count = 0
        self._random = np.random.default_rng(0)
        self.samples: defaultdict[StepShape, list[float]] = defaultdict(list)
        self.deadline_s = float("inf")

    @property
    def prefilling(self) -> bool:
        return self._ledger.prefilling

    @property
    def live(self) -> list[str]:
        """Keys in order of arrival."""
        return self._ledger.keys

    def restart(self) -> None:
        """Empty engine, same random prompts again: rounds must be alike."""
        for key in self.live:
            self.drop(key)
        self._random = np.random.default_rng(0)

    def add(self, prompt_tokens: int) -> str:
        key = f"r{self._count}"
        self._count += 1
        tokens: list[int] = self._random.integers(
            0, self._target.facts.vocab, prompt_tokens
        ).tolist()
        sampling = SamplingParams(output_tokens_max=OUTPUT_TOKENS_MAX, ignore_eos=True)
        self._target.engine.add(EngineRequest(key=key, prompt_tokens=tokens, sampling=sampling))
        self._ledger.add(key, prompt_tokens)
        return key

    def drop(self, key: str) -> None:
        self._target.engine.abort(key)
        self._ledger.remove(key)

    def step(self, *, note: bool = True) -> None:
        """One step, noted under its own shape."""
        shape, taken_s = self._timed()
        if note:
            self.samples[shape].append(taken_s)

    def decode(self, steps: int) -> None:
        """``steps`` (odd) steps in which nothing ends or begins, noted under the middle one's
        shape: time is linear in the context, which grows alike on both sides of it."""
        timed = [self._timed() for _ in range(steps)]
        middle = timed[steps // 2][0]
        self.samples[middle] += [taken_s for _, taken_s in timed]

    def _timed(self) -> tuple[StepShape, float]:
        shape, sampled = self._ledger.advance()
        if self._clock() > self.deadline_s:
            raise _OutOfTime
        began_s = self._watch()
        result = self._target.engine.step()
        taken_s = self._watch() - began_s
        self._check(shape, sampled, {chunk.key: chunk.finish for chunk in result.chunks})
        return shape, taken_s

    def _check(self, shape: StepShape, expected: set[str], found: dict[str, str | None]) -> None:
        ended = {key: finish for key, finish in found.items() if finish is not None}
        if ended:
            raise SweepFailed(f"requests ended in the middle of the sweep: {ended}")
        if found.keys() != expected:
            raise SweepFailed(
                f"a step of {shape} was to make a token for {sorted(expected)}, the engine made "
                f"them for {sorted(found)}: it does not schedule as the cost model assumes"
            )


def sweep(  # noqa: PLR0913  # the last three have defaults that only tests change
    target: Target,
    scenarios: list[Scenario],
    *,
    seconds: float,
    quantile: float = 0.5,
    say: Say = lambda _: None,
    clock: Clock = time.perf_counter,
    watch: Clock | None = None,
) -> Sweep:
    """Time ``scenarios``, the most wanted first, for about ``seconds``; raises SweepFailed if
    they do not suffice."""
    bench = Bench(target, clock, watch or stopwatch())
    began_s = clock()
    end_s = began_s + seconds
    kept, skipped = _warm_up(bench, scenarios, seconds=seconds, clock=clock)
    for scenario in skipped:
        say(f"left out, would not leave time for {ROUNDS_MIN} rounds: {scenario.name}")
    origins: dict[StepShape, str] = {}
    rounds = 0
    while rounds < SAMPLES_MIN or clock() + sum(kept.values()) <= end_s:
        for scenario in [s for s in scenarios if s.name in kept]:
            before_s, known = clock(), len(bench.samples)
            _run(bench, scenario, deadline_s=float("inf"))
            for shape in list(bench.samples)[known:]:
                origins[shape] = scenario.name
            kept[scenario.name] = clock() - before_s
        rounds += 1
        say(f"round {rounds}, {clock() - began_s:.0f} of {seconds:.0f} s")
    bench.restart()
    rows = [
        Row(shape, float(np.quantile(samples, quantile)), len(samples), origins[shape])
        for shape, samples in bench.samples.items()
        if len(samples) >= SAMPLES_MIN
    ]
    return Sweep(rows, rounds, clock() - began_s, quantile, [scenario.name for scenario in skipped])


def _warm_up(
    bench: Bench, scenarios: list[Scenario], *, seconds: float, clock: Clock
) -> tuple[dict[str, float], list[Scenario]]:
    """Seconds that each of the first scenarios takes, as many as leave time for enough rounds, and
    those that do not fit. The first one runs once before, untimed: first calls are slow."""
    kept: dict[str, float] = {}
    skipped: list[Scenario] = []
    _try(bench, scenarios[0], deadline_s=clock() + seconds / (SAMPLES_MIN + 1))
    for scenario in scenarios:
        rounds = SAMPLES_MIN if scenario.needed else ROUNDS_MIN
        before_s = clock()
        left_s = seconds / (rounds + 1) - sum(kept.values())
        if not skipped and _try(bench, scenario, deadline_s=before_s + left_s):
            kept[scenario.name] = clock() - before_s
        elif scenario.needed:
            raise SweepFailed(
                f"{scenario.name!r} does not leave time for {rounds} rounds: raise --seconds"
            )
        else:
            skipped.append(scenario)
    bench.samples.clear()
    return kept, skipped


def _try(bench: Bench, scenario: Scenario, *, deadline_s: float) -> bool:
    try:
        _run(bench, scenario, deadline_s=deadline_s)
    except _OutOfTime:
        bench.restart()
        return False
    return True


def _run(bench: Bench, scenario: Scenario, *, deadline_s: float) -> None:
    bench.restart()
    bench.deadline_s = deadline_s
    scenario.run(bench)
