"""The vocabulary of the batch scheduler that counts: sequences, plans, and what came of them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import IntEnum
from math import isqrt
from typing import Protocol

from services.worker.engine.prefix_cache import CachedBlocks
from shared.cost.step import DecodeTimes, Prefill


class Phase(IntEnum):
    WAITING = 0
    PREFILL = 1
    DECODE = 2
    ENDED = 3
    HELD = 4  # taken over, and not yet let go on


WAITING, PREFILL, DECODE, ENDED, HELD = Phase  # an enum member costs a look-up more


class Sequence:
    """One live request. Of its ``known`` tokens (prompt and output so far) ``computed`` are in the
    KV cache.

    While it decodes both follow from the batch's step counter and are not kept here: after step
    ``s`` it has ``offset + s`` tokens computed and one more known. ``Batch.computed`` tells.
    """

    __slots__ = (
        "admission", "computed", "end_step", "hash_tokens", "hashes", "held", "key", "known",
        "number", "offset", "phase", "prompt_tokens", "serial", "shared", "started", "tokens_max",
    )  # fmt: skip

    def __init__(self, key: str, *, number: int, prompt: int, known: int, tokens_max: int) -> None:
        self.key = key
        self.number = number  # order of arrival
        self.prompt_tokens = prompt
        self.known = known
        self.tokens_max = tokens_max
        self.computed = 0
        self.phase = WAITING
        self.started = False  # has made a token here, perhaps before it was preempted
        self.offset = self.end_step = 0  # while it decodes
        self.serial = -1  # of its place among those that decode
        self.hashes: SequenceOf[int] = ()
        self.hash_tokens = 0
        self.held: list[CachedBlocks] = []  # the cached blocks at its beginning that it refers to
        self.shared = 0  # how many KV blocks these are
        self.admission = 0  # another number each time it is given blocks anew

    @property
    def output_tokens(self) -> int:
        """How many it makes in all, if its content does not end it earlier."""
        return self.tokens_max - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class PrefillWork(Prefill):
    """``context``: tokens in the cache of the prompts worked on, after the step."""

    context: int = 0


class StepTimes(Protocol):
    """What the batch scheduler asks of a model of step times; shared.cost.step.StepModel is one."""

    def decode(self, batch: int, /) -> DecodeTimes: ...

    def step_ps(self, batch: int, context: int, prefill: PrefillWork, /) -> int: ...


Chunk = tuple[Sequence, int]
"""How many tokens of a sequence's prompt (and of its output so far) a step computes."""


class Plan:
    """Steps that follow each other and differ in counts only. ``times`` and ``context`` are those
    of a plan that only decodes, ``chunks`` are for one that prefills, which has a single step."""

    __slots__ = ("chunks", "context", "duration_ps", "preempted", "steps", "times")

    def __init__(
        self,
        steps: int,
        duration_ps: int,
        *,
        preempted: SequenceOf[Sequence],
        chunks: SequenceOf[Chunk] = (),
        times: DecodeTimes | None = None,
        context: int = 0,
    ) -> None:
        self.steps = steps
        self.duration_ps = duration_ps
        self.preempted = preempted
        self.chunks = chunks
        self.times = times
        self.context = context

    def steps_until(self, elapsed_ps: int) -> tuple[int, int]:
        """The first step that ends ``elapsed_ps`` after the plan began, or later: its number from
        1, and when it ends. The plan's last, if none ends so late."""
        times = self.times
        if self.steps == 1 or times is None or elapsed_ps > self.duration_ps:
            return self.steps, self.duration_ps
        count = max(_steps_within(times, self.context, elapsed_ps), 1)
        end_ps = times.total_ps(self.context, count)
        if end_ps < elapsed_ps:
            count, end_ps = count + 1, times.total_ps(self.context, count + 1)
        return count, end_ps


def _steps_within(times: DecodeTimes, context: int, elapsed_ps: int) -> int:
    """The largest n with ``total_ps(context, n) <= elapsed_ps``: the positive root of a quadratic,
    rounded down. 0 where steps take no time at all."""
    square = times.slope_ps * times.batch
    linear = 2 * (times.fixed_ps + times.slope_ps * context) + square
    if elapsed_ps <= 0 or not linear:
        return 0
    if not square:
        return 2 * elapsed_ps // linear
    return (isqrt(linear * linear + 8 * square * elapsed_ps) - linear) // (2 * square)


class Progress:
    """What came of the steps performed.

    ``first``: made their first token here; ``resumed``: had been preempted, and go on; ``ended``:
    made their last; ``preempted``: lost their blocks and wait again. ``decoding`` made a token in
    each of ``steps`` steps; ``first`` and ``resumed`` made one in the only step.
    """

    __slots__ = ("decoding", "ended", "first", "preempted", "resumed", "steps")

    def __init__(self, steps: int, decoding: int, preempted: SequenceOf[Sequence]) -> None:
        self.steps = steps
        self.decoding = decoding
        self.preempted = preempted
        self.first: list[Sequence] = []
        self.resumed: list[Sequence] = []
        self.ended: list[Sequence] = []
