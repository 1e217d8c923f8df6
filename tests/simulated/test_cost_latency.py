"""Estimated latencies against the batch scheduler that they stand for, with the same step times."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from services.worker.engine.batching import Batch
from shared.cost.latency import latency
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel, replica_model
from shared.cost.rates import rate
from shared.cost.step import PS_PER_S
from shared.hardware import Parallelism
from tests.support.costs import large_gpu, large_profile

LIMITS = EngineLimits(waiting_max=100_000)
REQUESTS, WARM_UP = 1200, 150


@dataclass
class Seen:
    arrived: dict[str, int] = field(default_factory=dict[str, int])
    first: dict[str, int] = field(default_factory=dict[str, int])
    ended: dict[str, int] = field(default_factory=dict[str, int])

    def ttft_s(self) -> float:
        waited = [self.first[key] - self.arrived[key] for key in self._counted()]
        return sum(waited) / len(waited) / PS_PER_S

    def tpot_s(self, output_tokens: int) -> float:
        took = [self.ended[key] - self.first[key] for key in self._counted()]
        return sum(took) / len(took) / (output_tokens - 1) / PS_PER_S

    def _counted(self) -> Iterator[str]:
        yield from (key for key in self.arrived if int(key) >= WARM_UP)


def simulate(model: CostModel, per_s: float, *, prompt_tokens: int, output_tokens: int) -> Seen:
    """Poisson arrivals of equal requests, every step performed singly."""
    rng = random.Random(7)
    arrivals: list[int] = []
    at_ps = 0.0
    for _ in range(REQUESTS):
        at_ps += rng.expovariate(per_s) * PS_PER_S
        arrivals.append(round(at_ps))
    batch = Batch(LIMITS, model.step, kv_blocks=model.kv_tokens // LIMITS.block_tokens)
    seen, now = Seen(), 0
    while len(seen.ended) < REQUESTS:
        if not batch.sequences:
            now = max(now, arrivals[len(seen.arrived)])
        while len(seen.arrived) < REQUESTS and arrivals[len(seen.arrived)] <= now:
            key = str(len(seen.arrived))
            seen.arrived[key] = arrivals[len(seen.arrived)]
            batch.add(key, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        plan = batch.plan()
        assert plan is not None
        now += plan.duration_ps if plan.times is None else plan.times.total_ps(plan.context, 1)
        progress = batch.advance(1)
        seen.first.update((sequence.key, now) for sequence in progress.first)
        seen.ended.update((sequence.key, now) for sequence in progress.ended)
    return seen


@pytest.mark.parametrize("load", [0.3, 0.8])
@pytest.mark.parametrize(
    ("shape", "prompt_tokens", "output_tokens", "tpot_rel"),
    [
        ("tp4", 1000, 100, 0.10),
        ("tp4", 200, 150, 0.10),
        ("tp4pp2", 200, 150, 0.10),
        # Long prompts come in bursts, which who decodes feels more than the mean step shows.
        ("tp4", 4000, 60, 0.20),
    ],
)
def test_estimates_are_what_the_batch_scheduler_does(
    shape: str, prompt_tokens: int, output_tokens: int, tpot_rel: float, load: float
) -> None:
    """Planners would rank plans by latencies, and by a capacity, that no replica has."""
    model = replica_model(large_profile(), large_gpu(), Parallelism.parse(shape))
    most = rate(
        model, input_tokens=prompt_tokens, output_tokens=output_tokens, ttft_s=1e9, tpot_s=1e9,
        limits=LIMITS,
    ).requests_per_s  # fmt: skip
    estimated = latency(
        model, requests_per_s=load * most, input_tokens=prompt_tokens,
        output_tokens=output_tokens, limits=LIMITS, cv2=0.0,
    )  # fmt: skip
    seen = simulate(model, load * most, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    assert estimated.ttft_s == pytest.approx(seen.ttft_s(), rel=0.15)
    assert estimated.tpot_s == pytest.approx(seen.tpot_s(output_tokens), rel=tpot_rel)
