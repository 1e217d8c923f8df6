"""Made-up profiles: a small one whose figures can be worked out by hand, and one of a size like
that of Llama-2-70B on H100s, whose figures are plausible but stand for no machine."""

import msgspec

from shared.cost.profile import (
    FORMAT,
    ErrorBar,
    GpuFacts,
    Link,
    ModelFacts,
    Overheads,
    Profile,
    TensorTimes,
)

SMALL_FACTS = ModelFacts(
    layers=4, hidden=8, heads=4, kv_heads=2, head_dim=4, ffn=32, vocab=100, gated=True
)
ERROR = ErrorBar(step_median=0.05, step_p90=0.1, ttft_p90=0.2, itl_p90=0.15, basis="made up")


def small_gpu() -> GpuFacts:
    """Sixty kilobytes of memory, round figures everywhere."""
    return GpuFacts(
        gpu="toy",
        memory_bytes=64_000,
        usable=0.9,
        reserved_bytes=4_000,
        gpus_per_node=4,
        price_per_hour=1.0,
        local=Link(bytes_per_s=1e12, latency_s=1e-6),
        peer=Link(bytes_per_s=1e9, latency_s=2e-6),
        host=Link(bytes_per_s=1e8, latency_s=1e-5),
        network=Link(bytes_per_s=1e8, latency_s=2e-5),
        disk=Link(bytes_per_s=1e4, latency_s=0.5),
        engine_start_s=10.0,
        source="made up",
    )


def small_profile() -> Profile:
    """tp1 and tp2; see the tests for what a step takes."""
    one = TensorTimes(
        tp=1,
        tokens=(1, 11, 111),
        dense_us=(10.0, 20.0, 220.0),
        collective_us=(0.0, 0.0, 0.0),
        head_us=(5.0, 5.0, 105.0),
        decode_us=3.0,
        decode_request_us=1.0,
        decode_context_ns=100.0,
        prefill_chunk_us=2.0,
        prefill_pair_ns=50.0,
    )
    two = msgspec.structs.replace(
        one,
        tp=2,
        dense_us=(6.0, 11.0, 111.0),
        collective_us=(1.0, 2.0, 12.0),
        decode_context_ns=50.0,
        prefill_pair_ns=25.0,
    )
    return Profile(
        format=FORMAT,
        gpu="toy",
        model="small",
        model_facts=SMALL_FACTS,
        times=(one, two),
        overheads=Overheads(step_us=100.0, request_us=1.0, chunk_us=7.0, hop_us=4.0),
        error=ERROR,
        source="made up",
    )


def large_gpu() -> GpuFacts:
    """The size of an H100."""
    return GpuFacts(
        gpu="big",
        memory_bytes=80 * 2**30,
        usable=0.9,
        reserved_bytes=2 * 2**30,
        gpus_per_node=8,
        price_per_hour=4.0,
        local=Link(bytes_per_s=2e12, latency_s=1e-6),
        peer=Link(bytes_per_s=300e9, latency_s=8e-6),
        host=Link(bytes_per_s=50e9, latency_s=1e-5),
        network=Link(bytes_per_s=40e9, latency_s=1.5e-5),
        disk=Link(bytes_per_s=6e9, latency_s=0.1),
        engine_start_s=30.0,
    )


def large_profile() -> Profile:
    """Affine in tokens from a roofline: weights read at 2.6 TB/s, 500 TFLOP/s, 16-bit."""
    facts = ModelFacts(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=32000
    )
    knots = (1, 64, 256, 1024, 2048, 8192)
    weights = 2 * 8192 * 64 * 128 + 2 * 8192 * 8 * 128 + 3 * 8192 * 28672
    head = 8192 * 32000

    def us(parameters: int, tokens: int, tp: int) -> float:
        return 1e6 * (2 * parameters / 2.6e12 + 2 * parameters * tokens / 500e12) / tp

    def times(tp: int) -> TensorTimes:
        moved = [0.0 if tp == 1 else 2 * (12.0 + 0.04 * tokens) for tokens in knots]
        return TensorTimes(
            tp=tp,
            tokens=knots,
            dense_us=tuple(us(weights, tokens, tp) for tokens in knots),
            collective_us=tuple(moved),
            head_us=tuple(us(head, tokens, tp) for tokens in knots),
            decode_us=6.0,
            decode_request_us=0.05,
            decode_context_ns=1.6 / tp,
            prefill_chunk_us=8.0,
            prefill_pair_ns=0.08 / tp,
        )

    return Profile(
        format=FORMAT,
        gpu="big",
        model="seventy",
        model_facts=facts,
        times=tuple(times(tp) for tp in (1, 2, 4, 8)),
        overheads=Overheads(step_us=1500.0, request_us=20.0, chunk_us=50.0, hop_us=20.0),
        error=ERROR,
    )
