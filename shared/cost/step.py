"""Time of one engine step, in whole picoseconds.

A step computes one token for each of ``batch`` decoding requests, which hold ``context`` tokens
together (the new ones included), and ``Prefill`` beside them. On one stage of ``layers`` layers

    layers * (dense(m) + collective(m) + decode attention + prefill attention) + head + overheads

with m tokens in all. With p pipeline stages the requests of a step form k = min(p, requests)
micro-batches that follow each other through the stages. While every stage is busy (k = p) a step
takes as long as the slowest stage needs for all micro-batches; with fewer, as long as one
micro-batch needs through all stages: that is the pipeline's bubble. Each hop adds a copy.

Integers make time exact: for a fixed batch a step is ``fixed + slope * context``, so the time of n
steps in a row is a sum that one formula gives to the last digit (``DecodeTimes.total_ps``). What
is fixed is convex and non-decreasing in the number of tokens only as far as it was measured so.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.cost.profile import GpuFacts, Link, Profile, TensorTimes
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

PS_PER_S = 1_000_000_000_000
PS_PER_US = 1_000_000
PS_PER_NS = 1_000


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prompt tokens of a step: how many, in how many chunks, how many pairs of a token and
    one it attends to (itself included), and how many chunks end their prompt."""

    tokens: int = 0
    chunks: int = 0
    pairs: int = 0
    ending: int = 0


NO_PREFILL = Prefill()


def pairs(done: int, tokens: int) -> int:
    """Pairs in a chunk of ``tokens`` tokens after ``done`` that are in the cache."""
    return tokens * done + tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Steps in which the same ``batch`` requests decode and nothing else happens."""

    batch: int
    fixed_ps: int
    slope_ps: int  # for each token of context

    def total_ps(self, context: int, steps: int) -> int:
        """The time of ``steps`` steps, the first of which follows on ``context`` tokens."""
        contexts = steps * context + self.batch * (steps * (steps + 1) // 2)
        return steps * self.fixed_ps + self.slope_ps * contexts


class Curve:
    """A piecewise linear function of a number of tokens, exact in integers at its knots."""

    __slots__ = ("_knots", "_values")

    def __init__(self, knots: Sequence[int], values_ps: Sequence[int]) -> None:
        assert len(knots) == len(values_ps) > 0
        assert all(a < b for a, b in pairwise(knots))
        self._knots, self._values = tuple(knots), tuple(values_ps)

    def at(self, tokens: int) -> int:
        """Between knots linear; before the first as the first; after the last on its last slope."""
        knots, values = self._knots, self._values
        if tokens <= knots[0] or len(knots) == 1:
            return values[0]
        i = min(bisect_right(knots, tokens), len(knots) - 1)
        x0, x1, y0, y1 = knots[i - 1], knots[i], values[i - 1], values[i]
        return max(0, y0 + (y1 - y0) * (tokens - x0) // (x1 - x0))


class StepModel:
    """Step times of one replica. Build it with ``step_model``."""

    def __init__(self, *, times: TensorTimes, collective_us: Sequence[float], profile: Profile,
                 stages: Sequence[int], hop: Link, speedup: float = 1.0) -> None:  # fmt: skip
        """``stages``: layers of each pipeline stage."""
        overheads, facts = profile.overheads, profile.model_facts

        def scaled(us: float) -> int:
            return round(us * PS_PER_US / speedup)

        dense = [a + b for a, b in zip(times.dense_us, collective_us, strict=True)]
        self._pp = len(stages)
        self._layers, self._longest = sum(stages), max(stages)
        self._dense = Curve(times.tokens, [scaled(us) for us in dense])
        self._head = Curve(times.tokens, [scaled(us) for us in times.head_us])
        self._decode, self._request = scaled(times.decode_us), scaled(times.decode_request_us)
        self._context = scaled(times.decode_context_ns / 1000)
        self._chunk, self._pair = scaled(times.prefill_chunk_us), times.prefill_pair_ns / speedup
        self._step_overhead = scaled(overheads.step_us)
        self._request_overhead = scaled(overheads.request_us)
        self._chunk_overhead = scaled(overheads.chunk_us)
        self._hop = scaled(overheads.hop_us + hop.latency_s * 1e6) if self._pp > 1 else 0
        hop_us = facts.hidden * 2 / hop.bytes_per_s * 1e6  # activations travel as 16-bit floats
        self._hop_token = scaled(hop_us) if self._pp > 1 else 0
        self._decodes: dict[int, DecodeTimes] = {}

    def decode(self, batch: int) -> DecodeTimes:
        """Times of steps in which ``batch`` requests decode and nothing else happens."""
        known = self._decodes.get(batch)
        if known is None:
            parts = min(self._pp, batch)
            fixed = self._fixed_ps(batch, parts, NO_PREFILL)
            slope = self._waited(parts) * self._context // parts
            known = self._decodes[batch] = DecodeTimes(batch, fixed, slope)
        return known

    def step_ps(self, batch: int, context: int, prefill: Prefill = NO_PREFILL) -> int:
        """Time of one step; ``context`` counts the decoding requests' tokens after it."""
        if not prefill.tokens:
            decode = self.decode(batch)
            return decode.fixed_ps + decode.slope_ps * context
        parts = min(self._pp, batch + prefill.chunks)
        attention = self._context * context + round(self._pair * PS_PER_NS * prefill.pairs)
        return self._fixed_ps(batch, parts, prefill) + self._waited(parts) * attention // parts

    def _fixed_ps(self, batch: int, parts: int, prefill: Prefill) -> int:
        """All that does not depend on tokens of context."""
        requests = batch + prefill.chunks
        tokens = -(-(batch + prefill.tokens) // parts)  # of one micro-batch
        sampled = -(-(batch + prefill.ending) // parts)
        layer = self._dense.at(tokens) + self._chunk * prefill.chunks // parts
        if batch:
            layer += self._decode + self._request * batch // parts
        passes = parts if parts == self._pp else 1  # micro-batches that the slowest stage serves
        head = self._head.at(sampled) if sampled else 0
        total = self._waited(parts) * layer + passes * head
        hops = self._pp * (self._hop + self._hop_token * tokens)
        overhead = (
            self._step_overhead
            + self._request_overhead * requests
            + self._chunk_overhead * prefill.chunks
        )
        return total + hops + overhead

    def _waited(self, parts: int) -> int:
        """Layers whose time, each for one micro-batch, a step waits for."""
        return parts * self._longest if parts == self._pp else self._layers


def step_model(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    *,
    nodes: int = 1,
    stages: Sequence[int] = (),
    speedup: float = 1.0,
) -> StepModel:
    """The step times of ``shape`` on ``nodes`` nodes; ``stages`` are the layers of each pipeline
    stage (default: as even as can be, the longer ones first).

    A pipeline that spans nodes hops over the network, tensor parallelism that does pays its
    all-reduces there. Raises ConfigInvalid for a shape that the profile does not hold.
    """
    times = next((t for t in profile.times if t.tp == shape.tp), None)
    if times is None:
        known = ", ".join(f"tp{t.tp}" for t in profile.times)
        raise ConfigInvalid(
            field="parallelism",
            value=str(shape),
            remedy=f"{profile.gpu}/{profile.model} was measured at {known}",
        )
    split = tuple(stages) or even_stages(profile.model_facts.layers, shape.pp)
    if len(split) != shape.pp or sum(split) != profile.model_facts.layers or min(split) < 1:
        raise ConfigInvalid(
            field="stages",
            value=split,
            remedy=f"give {shape.pp} numbers that sum to {profile.model_facts.layers}",
        )
    tensor_nodes = -(-nodes // shape.pp)
    collective = times.collective_us
    if tensor_nodes > 1:
        collective = _network_collective_us(times, profile, gpu)
    hop = gpu.network if nodes > 1 else gpu.peer
    return StepModel(
        times=times,
        collective_us=collective,
        profile=profile,
        stages=split,
        hop=hop,
        speedup=speedup,
    )


def even_stages(layers: int, pp: int) -> tuple[int, ...]:
    """``layers`` in ``pp`` stages that differ by at most one; raises ConfigInvalid."""
    if not 1 <= pp <= layers:
        raise ConfigInvalid(field="pp", value=pp, remedy=f"use 1 to {layers} stages")
    short, longer = divmod(layers, pp)
    return (short + 1,) * longer + (short,) * (pp - longer)


def _network_collective_us(
    times: TensorTimes, profile: Profile, gpu: GpuFacts
) -> tuple[float, ...]:
    """Two ring all-reduces a layer over the network: each moves 2 (n-1)/n of the activations
    through every link, in 2 (n-1) hops (Patarasuk and Yuan, 2009)."""
    n = times.tp
    byte_count = [2 * tokens * profile.model_facts.hidden for tokens in times.tokens]
    return tuple(
        2
        * 1e6
        * (2 * (n - 1) / n * b / gpu.network.bytes_per_s + 2 * (n - 1) * gpu.network.latency_s)
        for b in byte_count
    )
