"""Steady state, rates and latency against sums done by hand (the small profile) and against each
other (the large one)."""

import math

import pytest

from shared.cost.estimate import estimate
from shared.cost.latency import latency
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel, replica_model
from shared.cost.rates import Rate, rate
from shared.cost.steady import Work, batch_max, prompt_s, steady
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from tests.support.costs import large_gpu, large_profile, small_gpu, small_profile

SMALL = replica_model(small_profile(), small_gpu(), Parallelism())
LARGE = replica_model(large_profile(), large_gpu(), Parallelism(tp=4))
LIMITS = EngineLimits()
US = 1e-6


def test_a_prompt_alone() -> None:
    """TTFT would be off by a factor: 20 tokens in one chunk, dense 38 us and 2 a layer, 210 pairs,
    head 5, overheads 108: 4 x 40 + 4 x 10.5 + 5 + 108 = 315 us."""
    assert prompt_s(SMALL, Work(20, 5), room=2048) == pytest.approx(315 * US)


def test_a_prompt_in_chunks() -> None:
    """A long prompt would be counted once, not once for each chunk: 8 + 8 + 4 tokens, layers at
    17 + 2, 17 + 2, 13 + 2 us, all 210 pairs, 3 x 108 us, the head at its end: 583 us."""
    total = 4 * (19 + 19 + 15) + 42 + 3 * 108 + 5
    assert prompt_s(SMALL, Work(20, 5), room=8) == pytest.approx(total * US, rel=1e-6)


def test_a_steady_state_by_hand() -> None:
    """Rates are made of this. 6 requests of 20 + 13 tokens hold 6 x 26.5 = 159; 0.5 end in each
    step, so that it has k prompts of 20 with Poisson's probability of k at mean 0.5.
    None: 4 (15 + 3 + 6) + 4 x 15.9 + 5 + 106 = 270.6 us.
    One, 26 tokens: 4 (50 + 2 + 9) + 4 x 15.9 + 4 x 10.5 + 5 + 106 + 8 = 468.6 us.
    Several, 2.18 on average, 44 tokens and 458 pairs, 50 tokens in all: 4 (98 + 4 + 9) + 4 x 15.9
    + 4 x 22.9 + 5 + 106 + 16 = 726.2 us."""
    state = steady(SMALL, 6, Work(20, 13), LIMITS)
    none, one = math.exp(-0.5), 0.5 * math.exp(-0.5)
    kinds = ((none, 270.6), (one, 468.6), (1 - none - one, 726.2))
    mean = sum(share * step for share, step in kinds)
    assert state.step_s == pytest.approx(270.6 * US)
    assert state.itl_s == pytest.approx(mean * US)
    assert state.requests_per_s == pytest.approx(0.5 / (mean * US))
    # The step under way is longer than most, as who arrives finds the long ones more often.
    rest = sum(share * step**2 for share, step in kinds) / (2 * mean)
    assert state.ttft_s == pytest.approx((rest + 468.6) * US)
    # 20 + 6.5 + 7.5 of rounding for each who decodes, half a prompt of 27.5.
    assert state.kv_tokens == pytest.approx(6 * 34 + 0.5 * 27.5)
    assert state.running == 6.5
    assert state.sustained


def test_batches_that_outrun_their_prompts_are_not_sustained() -> None:
    """A replica would be promised more long prompts than its steps can compute."""
    limits = EngineLimits(batch_tokens_max=16)
    # 8 requests of 2 decode steps: 4 prompts of 20 tokens a step, and room for 8 tokens.
    state = steady(SMALL, 8, Work(20, 3), limits)
    assert not state.sustained
    # What comes is what prompts allow: 8 / 20 of a request per step.
    assert state.requests_per_s == pytest.approx(8 / 20 / state.itl_s)


def test_the_largest_batch_fills_the_cache() -> None:
    """Planned batches would be preempted: 324 tokens, 34 a request and its share of a prompt."""
    most = batch_max(SMALL, Work(20, 13), LIMITS)
    assert steady(SMALL, most, Work(20, 13), LIMITS).kv_tokens <= SMALL.kv_tokens == 324
    assert steady(SMALL, most + 1, Work(20, 13), LIMITS).kv_tokens > SMALL.kv_tokens
    assert batch_max(SMALL, Work(20, 13), EngineLimits(running_max=3)) < 3
    assert batch_max(SMALL, Work(300, 30), LIMITS) == 0


def test_an_estimate_says_whether_it_fits() -> None:
    """A table would show throughput for batches that no replica holds."""
    small = estimate(LARGE, batch=8, input_tokens=1000, output_tokens=200)
    large = estimate(LARGE, batch=4000, input_tokens=1000, output_tokens=200)
    assert small.fits
    assert not large.fits
    assert small.step_s < small.itl_s < large.itl_s
    assert small.ttft_s < small.ttft_busy_s
    assert small.tokens_per_s == pytest.approx(200 * small.requests_per_s)
    with pytest.raises(ConfigInvalid, match="batch"):
        estimate(LARGE, batch=0, input_tokens=1, output_tokens=1)


def test_one_output_token_is_prefill_only() -> None:
    """Embedding-like work would divide by zero: a step holds 2048 / 1000 prompts."""
    one = estimate(LARGE, batch=8, input_tokens=1000, output_tokens=1)
    assert one.itl_s == 0
    assert 0 < 1 / one.requests_per_s < one.ttft_s * 1.1
    found = rate(LARGE, input_tokens=1000, output_tokens=1, ttft_s=5, tpot_s=0.1)
    assert found.requests_per_s == one.requests_per_s
    assert found.limited_by == "compute"


def of(model: CostModel = LARGE, *, limits: EngineLimits = LIMITS, **change: float) -> Rate:
    asked = {"input_tokens": 1000.0, "output_tokens": 200.0, "ttft_s": 5.0, "tpot_s": 0.2}
    return rate(model, **{**asked, **change}, limits=limits)


def test_each_bound_is_named() -> None:
    """An operator would add memory where steps are too slow."""
    free = EngineLimits(running_max=4096, batch_tokens_max=8192)
    assert of(tpot_s=0.045).limited_by == "tpot"
    assert of(ttft_s=0.15).limited_by == "ttft"
    assert of(limits=EngineLimits(running_max=16)).limited_by == "seats"
    assert of(tpot_s=9.0, ttft_s=90.0, output_tokens=2000, limits=free).limited_by == "kv"
    assert of(tpot_s=9.0, ttft_s=90.0, output_tokens=20, limits=free).limited_by == "compute"


def test_a_rate_is_what_its_batch_makes() -> None:
    """Rate and batch would tell two stories: B / ((o - 1) ITL), the largest B that passes."""
    found = of(tpot_s=0.045)
    assert found.requests_per_s == pytest.approx(found.batch / (199 * found.itl_s), rel=1e-3)
    assert found.itl_s <= 0.045
    assert steady(LARGE, found.batch + 1, Work(1000, 200), LIMITS).itl_s > 0.045


def test_targets_out_of_reach_have_no_rate() -> None:
    """A plan would send requests where each of them misses its target."""
    assert of(ttft_s=0.05) == Rate(0.0, 0, 0.0, of(ttft_s=0.05).ttft_s, "ttft")
    assert of(tpot_s=0.001).requests_per_s == 0
    assert of(tpot_s=0.001).limited_by == "tpot"
    assert of(input_tokens=10**6, ttft_s=1e9).limited_by == "kv"


def test_more_gpus_sustain_more() -> None:
    """Plans would prefer small replicas for requests that need large ones."""
    eight = replica_model(large_profile(), large_gpu(), Parallelism(tp=8))
    assert of(eight, tpot_s=0.045).requests_per_s > of(tpot_s=0.045).requests_per_s


def test_latency_meets_the_idle_replica_and_the_saturated_one() -> None:
    """A plan's latency would be wrong at both ends, where it is known."""
    most = of(tpot_s=9.0, ttft_s=90.0).requests_per_s

    def at(load: float) -> float:
        return latency(
            LARGE, requests_per_s=load * most, input_tokens=1000, output_tokens=200
        ).ttft_s

    idle = estimate(LARGE, batch=1, input_tokens=1000, output_tokens=200).ttft_s
    assert at(1e-6) == pytest.approx(idle, rel=1e-3)
    loads = [0.1, 0.3, 0.5, 0.7, 0.9, 0.97]
    assert [at(load) for load in loads] == sorted(at(load) for load in loads)
    assert at(1.2) == math.inf
    over = latency(LARGE, requests_per_s=1.2 * most, input_tokens=1000, output_tokens=200)
    assert over.utilisation == pytest.approx(1.2, rel=0.02)


def test_prompts_wait_as_in_an_m_g_1_queue() -> None:
    """Ranking by TTFT would have no theory behind it: with one output token and lengths all alike
    the wait is that of M/D/1, rho s / (2 (1 - rho)), with exponential ones twice that."""
    service_s = 1 / of(output_tokens=1).requests_per_s
    idle = estimate(LARGE, batch=1, input_tokens=1000, output_tokens=1).ttft_s
    for cv2 in (0.0, 1.0):
        found = latency(
            LARGE, requests_per_s=0.8 / service_s, input_tokens=1000, output_tokens=1, cv2=cv2
        )
        expected = 0.8 * service_s * (1 + cv2) / (2 * 0.2)
        assert found.ttft_s - idle == pytest.approx(expected)
        assert found.ttft_s_p99 > found.ttft_s


def test_latency_needs_room_for_one_request() -> None:
    """A request that never fits would seem to be served."""
    never = latency(LARGE, requests_per_s=0.1, input_tokens=10**6, output_tokens=5)
    assert never.ttft_s == math.inf
    over = latency(LARGE, requests_per_s=1e6, input_tokens=1000, output_tokens=1)
    assert over.utilisation > 1
