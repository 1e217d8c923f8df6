"""One replica that serves one request at a time is a queue whose mean wait is known exactly.

Pollaczek and Khinchine (1930, 1932): with Poisson arrivals at rate a and service times S, the mean
wait is ``a E[S^2] / (2 (1 - a E[S]))``. The mean wait of 10,000 requests is itself uncertain by 5
to 11 %, so that an error of 2 % could not be seen. Lindley's recursion over the same arrivals and
services has that exact mean, and moves with the simulated one: as a control variate it takes the
uncertainty out. That its own mean is the exact one is tested on millions of draws.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from loadgen.simulator.run import run
from loadgen.workload.records import TraceRecord
from shared.mesh import MeshConfig
from tests.support.clusters import mesh_of, spec_of

REQUESTS = 10_000
STEP_S, PREFILL_TOKEN_S, DECODE_S = 0.001, 1e-5, 5e-4
PROMPT, SHORT = 100, 20
MEAN_OUTPUT = 200  # geometric; so many short steps are nearly exponential
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Queue:
    """``outputs``: tokens of each request. ``first_s`` is the time of a prompt's step, ``each_s``
    of each later token's; ``moments``: E[S] and E[S^2] of the services."""

    outputs: Sequence[int]
    moments: tuple[float, float]
    first_s: float = STEP_S + PREFILL_TOKEN_S * PROMPT
    each_s: float = STEP_S + DECODE_S

    def mean_wait_s(self, rps: float) -> float:
        mean_s, square_s2 = self.moments
        return rps * square_s2 / (2.0 * (1.0 - rps * mean_s))

    def services_s(self) -> Floats:
        return self.first_s + self.each_s * (np.array(self.outputs, dtype=np.float64) - 1.0)


def constant() -> Queue:
    service_s = Queue((), (0.0, 0.0)).first_s + Queue((), (0.0, 0.0)).each_s * (SHORT - 1)
    return Queue([SHORT] * REQUESTS, (service_s, service_s**2))


def geometric(count: int = REQUESTS, seed: int = 3) -> Queue:
    """S = f + e (L - 1) with L geometric on 1, 2, ...: E[L] = 1/p, Var[L] = (1 - p)/p^2."""
    outputs = np.random.default_rng(seed).geometric(1.0 / MEAN_OUTPUT, count)
    draft = Queue(outputs.tolist(), (0.0, 0.0))
    mean_s = draft.first_s + draft.each_s * (MEAN_OUTPUT - 1)
    variance_s2 = draft.each_s**2 * MEAN_OUTPUT * (MEAN_OUTPUT - 1)
    return Queue(draft.outputs, (mean_s, variance_s2 + mean_s**2))


def arrivals_s(count: int, rps: float, seed: int) -> Floats:
    return np.cumsum(np.random.default_rng(seed).exponential(1.0 / rps, count))


def lindley_s(arrived_s: Floats, services_s: Floats) -> Floats:
    """The wait of each request: ``W = max(0, W' + S' - gap)``, which is how far the sum of
    ``S - gap`` lies above its lowest point so far."""
    walk = np.concatenate(([0.0], np.cumsum(services_s[:-1] - np.diff(arrived_s))))
    return walk - np.minimum.accumulate(walk)


def one_at_a_time() -> MeshConfig:
    return mesh_of(
        base_s=STEP_S,
        prefill_token_s=PREFILL_TOKEN_S,
        decode_token_s=DECODE_S,
        context_token_s=0.0,
        running_max=1,
        waiting_max=REQUESTS,
        kv_blocks=100_000,
    )


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("queue", [constant(), geometric()], ids=["M/D/1", "M/M/1"])
def test_the_mean_wait_is_that_of_the_theory(queue: Queue, load: float) -> None:
    """Arrivals, queues or the engines' clock would be off in every figure of the simulator."""
    rps = load / queue.moments[0]
    arrived_s = arrivals_s(REQUESTS, rps, seed=round(100 * load))
    records = [
        TraceRecord(timestamp_s=at_s, input_tokens=PROMPT, output_tokens=output)
        for at_s, output in zip(arrived_s.tolist(), queue.outputs, strict=True)
    ]
    result = run(spec_of(one_at_a_time(), records, network_s=0.0))
    assert result.requests.completed.all()
    waits_s = result.requests.ttft_s - queue.first_s
    control_s = lindley_s(arrived_s, queue.services_s())
    exact_s = queue.mean_wait_s(rps)
    estimate_s = float(waits_s.mean() - control_s.mean()) + exact_s
    assert estimate_s == pytest.approx(exact_s, rel=0.02)
    assert waits_s == pytest.approx(control_s, abs=1e-6), "request by request"
    assert float(waits_s.mean()) == pytest.approx(exact_s, rel=0.25), "without the control variate"


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_control_variate_has_the_mean_of_the_theory(load: float) -> None:
    """The control variate would hide an error instead of noise. Means of two million draws are
    uncertain by 0.4 to 0.8 %."""
    count = 2_000_000
    drawn = geometric(count, seed=round(1000 * load))
    for queue, services_s in (
        (constant(), np.full(count, constant().moments[0])),
        (drawn, drawn.services_s()),
    ):
        rps = load / queue.moments[0]
        waits_s = lindley_s(arrivals_s(count, rps, seed=7), services_s)
        assert float(waits_s.mean()) == pytest.approx(queue.mean_wait_s(rps), rel=0.02)


def test_many_short_steps_are_nearly_exponential() -> None:
    """M/G/1 with these services would be no test of the M/M/1 limit: its mean wait is
    ``load / (1 - load)`` services."""
    queue = geometric(1)
    for load in (0.5, 0.8):
        rps = load / queue.moments[0]
        exponential_s = load / (1.0 - load) * queue.moments[0]
        assert queue.mean_wait_s(rps) == pytest.approx(exponential_s, rel=0.01)


def test_a_batch_of_any_size_is_faster_than_its_requests_in_a_row() -> None:
    """The queue above would be no special case of continuous batching, but all there is."""
    rng = random.Random(5)
    records = [
        TraceRecord(timestamp_s=rng.uniform(0.0, 10.0), input_tokens=PROMPT, output_tokens=SHORT)
        for _ in range(400)
    ]
    records.sort(key=lambda record: record.timestamp_s)
    alone = run(spec_of(one_at_a_time(), records))
    wide = mesh_of(base_s=STEP_S, prefill_token_s=PREFILL_TOKEN_S, decode_token_s=DECODE_S)
    together = run(spec_of(wide, records))
    assert together.duration_s < alone.duration_s
    assert together.requests.ttft_s.mean() < alone.requests.ttft_s.mean() / 5
