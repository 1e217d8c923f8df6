"""The profiles that are shipped."""

from itertools import pairwise

import pytest

from services.profiler.fit.gpus import KINDS
from services.profiler.fit.models import SHIPPED, SHIPPED_FP8
from shared.cost.library import gpu_facts, known, load_profile
from shared.cost.memory import fits, kv_capacity_tokens
from shared.cost.step import PS_PER_S, Prefill, pairs, step_model
from shared.hardware import Parallelism

PAIRS = [(gpu, name) for gpu in sorted(KINDS) for name in sorted(SHIPPED)] + [
    (gpu, f"{name}-fp8") for gpu, kind in sorted(KINDS.items()) if kind.fp8 for name in SHIPPED_FP8
]


def step_ms(gpu: str, name: str, tp: int, batch: int, context: int, prompt: int = 0) -> float:
    model = step_model(load_profile(gpu, name), gpu_facts(gpu), Parallelism(tp))
    prefill = Prefill(prompt, 1, pairs(0, prompt), 1) if prompt else Prefill()
    return model.step_ps(batch, batch * context, prefill) / PS_PER_S * 1e3


def test_all_are_there() -> None:
    """A user would be sent to fit what was promised to be shipped."""
    assert set(PAIRS) <= set(known())


@pytest.mark.parametrize(("gpu", "name"), PAIRS)
def test_each_is_whole(gpu: str, name: str) -> None:
    """A step with more tokens would take less time, a shape be missing, or nobody know whence the
    numbers are."""
    profile = load_profile(gpu, name)
    assert [times.tp for times in profile.times] == ([1, 2, 4] if "30b" in name and "llama" in name
                                                     else [1, 2, 4, 8])  # fmt: skip
    for times in profile.times:
        for curve in (times.dense_us, times.collective_us, times.head_us):
            assert all(one <= after for one, after in pairwise(curve))
        assert times.decode_context_ns > 0
        assert times.prefill_pair_ns > 0
        assert min(times.dense_us) > 0
        assert (times.tp == 1) == (max(times.collective_us) == 0)
    assert 0 < profile.error.step_median < profile.error.step_p90
    assert profile.error.itl_p90 > 0
    assert profile.error.ttft_p90 > 0
    assert profile.error.basis
    assert "Apache-2.0" in profile.source
    assert "calibrated" in profile.error.basis
    assert (profile.model_facts.weight_bytes == 1) == name.endswith("-fp8")


@pytest.mark.parametrize("gpu", sorted(KINDS))
def test_links_are_in_order(gpu: str) -> None:
    """Bytes and bits, or micro- and milliseconds, mixed up would reorder them."""
    facts = gpu_facts(gpu)
    assert facts.local.bytes_per_s > facts.peer.bytes_per_s > facts.disk.bytes_per_s
    assert 1e9 < facts.network.bytes_per_s < 1e11
    assert 1e-6 <= facts.peer.latency_s <= facts.network.latency_s < 1e-3
    assert "not measured" in facts.source


def test_seventy_billion_on_two_gpus_of_80_gb() -> None:
    """It fits, with next to no room for KV cache; on one it does not."""
    gpu, profile = gpu_facts("h100"), load_profile("h100", "llama-3.1-70b")
    assert not fits(profile, gpu, Parallelism(1))
    few = kv_capacity_tokens(profile, gpu, Parallelism(2))
    assert 10_000 < few < 50_000
    assert kv_capacity_tokens(profile, gpu, Parallelism(4)) > 10 * few
    eight_bit = load_profile("h100", "llama-3.1-70b-fp8")
    assert kv_capacity_tokens(eight_bit, gpu, Parallelism(2)) > 5 * few


def test_seventy_billion_decode_as_vllm_does() -> None:
    """vLLM takes about 22 ms a step on four H100 with 64 requests in flight, and never less than
    reading 35 GB of weights takes: 10.5 ms."""
    assert 17 < step_ms("h100", "llama-3.1-70b", 4, 64, 800) < 26
    assert 10.5 < step_ms("h100", "llama-3.1-70b", 4, 1, 100) < 20


def test_prompts_take_the_time_of_their_arithmetic() -> None:
    """2,048 tokens of Llama-3.1-8B are 31 TFLOP beside attention: at 40 to 90 % of an H100's
    989 TFLOPS, 35 to 79 ms."""
    assert 35 < step_ms("h100", "llama-3.1-8b", 1, 0, 0, prompt=2048) < 79


def test_gpus_are_in_order() -> None:
    """A planner would prefer the slower one."""
    for batch in (1, 64):
        times = [step_ms(gpu, "llama-3.1-8b", 1, batch, 1000) for gpu in ("h200", "h100", "a100-80",
                                                                        "l40s")]  # fmt: skip
        assert times == sorted(times)


def test_tensor_parallelism_over_pcie_is_dear() -> None:
    """L40S have no NVLink: prompts gain little from a second GPU, and lose from the eighth."""
    times = [step_ms("l40s", "llama-3.1-8b", tp, 0, 0, prompt=4096) for tp in (1, 2, 4, 8)]
    assert times[1] > 0.5 * times[0]
    assert times[3] > times[2]
    nvlink = [step_ms("h100", "llama-3.1-8b", tp, 0, 0, prompt=4096) for tp in (1, 2, 4, 8)]
    assert nvlink == sorted(nvlink, reverse=True)


def test_eight_bit_weights_are_faster() -> None:
    """Half the bytes to read."""
    assert step_ms("h100", "llama-3.1-70b-fp8", 4, 8, 500) < 0.75 * step_ms(
        "h100", "llama-3.1-70b", 4, 8, 500
    )
