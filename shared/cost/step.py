"""Time of one engine step, in whole picoseconds.

A step computes one token for each of ``batch`` decoding requests, which hold ``context`` tokens
together (the new ones included), and ``Prefill`` beside them. On one stage of ``layers`` layers

    layers * (dense(m) + collective(m) + decode attention + prefill attention) + head + overheads

with m tokens in all. With p pipeline stages the requests of a step form k = min(p, requests)
micro-batches that follow each other through the stages: decoding requests spread evenly over them,
prompts over as many as there are chunks, a chunk being cut only where it exceeds the usual budget
of a micro-batch (engines send the pieces of a prompt in a row). The micro-batches go round, so a
step (a token for everyone) takes the longest of

    the heaviest micro-batch's way through all layers, then the head; where a prompt that was cut
    ends, after the time that the longest stage needs for each of its other pieces
    all k micro-batches, one after the other, in the stage with most layers
    all k micro-batches, one after the other, in the last stage, which has the head, too

and the copies between stages. So a lone request gains nothing from stages, a full pipeline of even
stages is p times as fast as one that is not filled (the difference is its bubble), and an uneven
split waits for its longest stage. What depends on context is bounded from above by the steepest of
the three, which is exact for even stages; it keeps time linear in context.

Integers make time exact: for a fixed batch a step is ``fixed + slope * context``, so the time of n
steps in a row is a sum that one formula gives to the last digit (``DecodeTimes.total_ps``). Time
never falls as tokens, or requests with their context, are added, if the measured curves do not.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.cost.limits import DEFAULT_LIMITS
from shared.cost.profile import GpuFacts, Link, Profile, TensorTimes
from shared.cost.stages import stages_of
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
        """Between knots linear; before the first as the first; after the last on its last slope,
        and level where that one falls."""
        knots, values = self._knots, self._values
        if tokens <= knots[0] or len(knots) == 1:
            return values[0]
        i = min(bisect_right(knots, tokens), len(knots) - 1)
        x0, x1, y0, y1 = knots[i - 1], knots[i], values[i - 1], values[i]
        if tokens > x1 and y1 < y0:
            return y1
        return y0 + (y1 - y0) * (tokens - x0) // (x1 - x0)


class StepModel:
    """Step times of one replica. Build it with ``step_model``."""

    def __init__(
        self,
        *,
        times: TensorTimes,
        collective_us: Sequence[float],
        profile: Profile,
        stages: Sequence[int],
        hops: Sequence[Link],
        speedup: float = 1.0,
    ) -> None:
        """``stages``: layers of each pipeline stage; ``hops``: the links between them, in order.
        The sampled tokens go back over a link like the slowest of these."""
        overheads = profile.overheads

        def scaled(us: float) -> int:
            return round(us * PS_PER_US / speedup)

        dense = [a + b for a, b in zip(times.dense_us, collective_us, strict=True)]
        self._pp = len(stages)
        self._piece_tokens = DEFAULT_LIMITS.batch_tokens_max
        self._layers, self._longest, self._last = sum(stages), max(stages), stages[-1]
        self._dense = Curve(times.tokens, [scaled(us) for us in dense])
        self._head = Curve(times.tokens, [scaled(us) for us in times.head_us])
        self._decode, self._request = scaled(times.decode_us), scaled(times.decode_request_us)
        # Floats: they are multiplied by many tokens before they become whole picoseconds.
        self._context = times.decode_context_ns * PS_PER_NS / speedup
        self._pair = times.prefill_pair_ns * PS_PER_NS / speedup
        self._chunk = scaled(times.prefill_chunk_us)
        self._step_overhead = scaled(overheads.step_us)
        self._request_overhead = scaled(overheads.request_us)
        self._chunk_overhead = scaled(overheads.chunk_us)
        self._hops = self._hop_token = 0
        if hops:
            latencies_s = [hop.latency_s for hop in hops]
            around_s = sum(latencies_s) + max(latencies_s)
            self._hops = scaled(self._pp * overheads.hop_us + around_s * 1e6)
            byte_count = profile.model_facts.hidden * 2  # activations travel as 16-bit floats
            token_s = sum(byte_count / hop.bytes_per_s for hop in hops) / len(hops)
            self._hop_token = scaled(token_s * 1e6)
        self._decodes: dict[int, DecodeTimes] = {}

    def decode(self, batch: int) -> DecodeTimes:
        """Times of steps in which ``batch`` requests, one at least, decode and nothing else
        happens."""
        known = self._decodes.get(batch)
        if known is None:
            assert batch > 0, "a step of nothing has no time"
            parts = min(self._pp, batch)
            fixed = self._fixed_ps(batch, parts, NO_PREFILL)
            slope = round(self._waited(parts) * self._context / parts)
            known = self._decodes[batch] = DecodeTimes(batch, fixed, slope)
        return known

    def step_ps(self, batch: int, context: int, prefill: Prefill = NO_PREFILL) -> int:
        """Time of one step; ``context`` counts the decoding requests' tokens after it."""
        if not prefill.tokens:
            decode = self.decode(batch)
            return decode.fixed_ps + decode.slope_ps * context
        assert prefill.chunks > 0, "prompt tokens come in chunks"
        if self._pp == 1:
            return self._single_ps(batch, context, prefill)
        return self._pipelined_ps(batch, context, prefill)

    def _single_ps(self, batch: int, context: int, prefill: Prefill) -> int:
        """``_pipelined_ps`` for one stage, which most replicas have, at a third of the work."""
        chunks, sampled = prefill.chunks, batch + prefill.ending
        layer = self._dense.at(batch + prefill.tokens) + self._chunk * chunks
        total = self._step_overhead + self._request_overhead * (batch + chunks)
        total += self._chunk_overhead * chunks + round(self._layers * self._pair * prefill.pairs)
        if batch:
            layer += self._decode + self._request * batch
            total += self.decode(batch).slope_ps * context
        if sampled:
            total += self._head.at(sampled)
        return total + self._layers * layer

    def _pipelined_ps(self, batch: int, context: int, prefill: Prefill) -> int:
        pieces, heaviest = self._cut(prefill)
        slope = self.decode(batch).slope_ps if batch else 0
        share = max(self._layers * heaviest / prefill.tokens, self._longest)
        pairs_ps = round(share * self._pair * prefill.pairs)
        parts = min(self._pp, batch + pieces)
        return self._fixed_ps(batch, parts, prefill) + slope * context + pairs_ps

    def _cut(self, prefill: Prefill) -> tuple[int, int]:
        """How many micro-batches have a share of the prompts, and the tokens of the largest. More
        tokens never make fewer or smaller ones."""
        pieces = min(self._pp, max(prefill.chunks, -(-prefill.tokens // self._piece_tokens)))
        whole = -(-prefill.tokens // min(self._pp, prefill.chunks))
        return pieces, max(-(-prefill.tokens // self._pp), min(whole, self._piece_tokens))

    def _cuts(self, prefill: Prefill) -> int:
        """Into how many pieces a prompt of the step is cut, all prompts being taken as alike."""
        tokens = -(-prefill.tokens // prefill.chunks)
        return min(self._pp, -(-tokens // self._piece_tokens))

    def _fixed_ps(self, batch: int, parts: int, prefill: Prefill) -> int:
        """All but what each token of context and each pair of prefill adds."""
        decoding = -(-batch // parts)  # in one micro-batch
        heavy = small = self._layer_ps(decoding, 0, 0)
        pieces = heaviest = ending = 0
        if prefill.tokens:
            pieces, heaviest = self._cut(prefill)
            ending, chunks = -(-prefill.ending // pieces), -(-prefill.chunks // pieces)
            heavy = self._layer_ps(decoding, heaviest, chunks)
        sampled = decoding + ending
        head = self._head.at(sampled) if sampled else 0
        row = pieces * heavy + (parts - pieces) * small  # one layer, all micro-batches in a row
        way = self._layers
        if ending:
            way += (self._cuts(prefill) - 1) * self._longest
        slowest = max(
            way * heavy + head,
            self._longest * row,
            self._last * row + parts * head,
        )
        # A lone micro-batch is copied p - 1 times; a full pipeline makes a stage wait for k copies.
        copies = max(self._pp - 1, parts)
        hops = self._hops + self._hop_token * copies * (decoding + heaviest)
        overhead = (
            self._step_overhead
            + self._request_overhead * (batch + prefill.chunks)
            + self._chunk_overhead * prefill.chunks
        )
        return slowest + hops + overhead

    def _layer_ps(self, batch: int, tokens: int, chunks: int) -> int:
        """One layer, one micro-batch: what its requests that decode, and its prompts, take."""
        if not batch and not tokens:
            return 0
        total = self._dense.at(batch + tokens) + self._chunk * chunks
        return total + self._decode + self._request * batch if batch else total

    def _waited(self, parts: int) -> int:
        """Layers whose time, each for one of ``parts`` micro-batches, a step waits for."""
        return max(self._layers, parts * self._longest)


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

    Ranks fill one node after the other: a pipeline that spans nodes hops over the network where it
    leaves one, and tensor parallelism that spans them pays its all-reduces there. Raises
    ConfigInvalid for a shape that the profile does not hold.
    """
    times = next((t for t in profile.times if t.tp == shape.tp), None)
    if times is None:
        measured = ", ".join(f"tp{t.tp}" for t in profile.times)
        raise ConfigInvalid(
            field="parallelism",
            value=str(shape),
            remedy=f"{profile.gpu}/{profile.model} was measured at {measured}",
        )
    if not 1 <= nodes <= shape.gpus:
        raise ConfigInvalid(field="nodes", value=nodes, remedy=f"use 1 to {shape.gpus} for {shape}")
    if not 0 < speedup < math.inf:
        raise ConfigInvalid(field="speedup", value=speedup, remedy="use a number above 0")
    split = stages_of(profile.model_facts, shape, stages)
    collective = times.collective_us
    if nodes > shape.pp:
        collective = _network_collective_us(times, profile, gpu)
    abroad = min(nodes, shape.pp) - 1
    hops = (gpu.network,) * abroad + (gpu.peer,) * (shape.pp - 1 - abroad)
    return StepModel(
        times=times,
        collective_us=collective,
        profile=profile,
        stages=split,
        hops=hops,
        speedup=speedup,
    )


def _network_collective_us(
    times: TensorTimes, profile: Profile, gpu: GpuFacts
) -> tuple[float, ...]:
    """Two ring all-reduces a layer over the network: each moves 2 (n-1)/n of the activations
    through every link, in 2 (n-1) hops (Patarasuk and Yuan, 2009). Never less than in a node."""
    n, network = times.tp, gpu.network
    ring_us = (
        2
        * 1e6
        * (2 * (n - 1) / n * byte_count / network.bytes_per_s + 2 * (n - 1) * network.latency_s)
        for byte_count in (2 * tokens * profile.model_facts.hidden for tokens in times.tokens)
    )
    return tuple(max(pair) for pair in zip(ring_us, times.collective_us, strict=True))
