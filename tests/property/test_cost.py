"""The cost model over random profiles whose curves do not fall: what must hold for any machine."""

import tempfile
from itertools import accumulate
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cost.files import dump_profile, read_profile, write_profile
from shared.cost.latency import latency
from shared.cost.limits import EngineLimits
from shared.cost.memory import kv_capacity_tokens, weight_bytes
from shared.cost.model import CostModel, replica_model
from shared.cost.profile import GpuFacts, ModelFacts, Overheads, Profile, TensorTimes
from shared.cost.rates import rate
from shared.cost.step import Prefill, StepModel, pairs, step_model
from shared.hardware import Parallelism
from tests.support.costs import ERROR, large_gpu, large_profile, small_gpu, small_profile

LAYERS = 12
amounts = st.floats(0, 1000, allow_nan=False)


@st.composite
def curves(draw: st.DrawFn, knots: int) -> tuple[float, ...]:
    """Values that do not fall."""
    rises = draw(st.lists(amounts, min_size=knots, max_size=knots))
    return tuple(accumulate([1.0 + rises[0], *rises[1:]]))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    gaps = draw(st.lists(st.integers(1, 500), min_size=1, max_size=5))
    tokens = tuple(accumulate(gaps))
    times = TensorTimes(
        tp=1,
        tokens=tokens,
        dense_us=draw(curves(len(tokens))),
        collective_us=(0.0,) * len(tokens),
        head_us=draw(curves(len(tokens))),
        decode_us=draw(amounts),
        decode_request_us=draw(amounts),
        decode_context_ns=draw(amounts),
        prefill_chunk_us=draw(amounts),
        prefill_pair_ns=draw(amounts),
    )
    facts = msgspec.structs.replace(small_profile().model_facts, layers=LAYERS)
    overheads = Overheads(
        step_us=draw(amounts), request_us=draw(amounts), chunk_us=draw(amounts),
        hop_us=draw(amounts),
    )  # fmt: skip
    return Profile(
        format=1, gpu="toy", model="drawn", model_facts=facts, times=(times,),
        overheads=overheads, error=ERROR,
    )  # fmt: skip


splits = st.sampled_from(
    [(12,), (6, 6), (8, 4), (1, 11), (4, 4, 4), (10, 1, 1), (1, 10, 1), (5, 4, 2, 1)]
)


@st.composite
def models(draw: st.DrawFn) -> StepModel:
    stages = draw(splits)
    return step_model(
        draw(profiles()), small_gpu(), Parallelism(pp=len(stages)), stages=stages,
        nodes=draw(st.integers(1, len(stages))),
    )  # fmt: skip


batches = st.integers(1, 300)
contexts = st.integers(0, 4000)  # tokens of one request


@given(profiles(), st.integers(0, 300), contexts, st.integers(1, 4000), st.integers(1, 8))
def test_one_stage_is_a_pipeline_of_one(
    profile: Profile, batch: int, context: int, tokens: int, chunks: int
) -> None:
    """The short cut for the usual shape would be another model."""
    model = step_model(profile, small_gpu(), Parallelism())
    count = min(chunks, tokens)
    work = Prefill(tokens, count, pairs(7, tokens), count // 2)
    held = batch * context
    assert model.step_ps(batch, held, work) == model._pipelined_ps(batch, held, work)  # pyright: ignore[reportPrivateUsage]


@given(models(), batches, contexts, st.integers(0, 100))
def test_a_leap_equals_single_steps(model: StepModel, batch: int, context: int, steps: int) -> None:
    """A simulation would depend on where its leaps end."""
    held = batch * context
    single = [model.step_ps(batch, held + batch * n) for n in range(1, steps + 1)]
    assert model.decode(batch).total_ps(held, steps) == sum(single)


@given(models(), batches, contexts, st.integers(0, 3000), st.integers(1, 3))
def test_more_work_takes_no_less_time(
    model: StepModel, batch: int, context: int, tokens: int, chunks: int
) -> None:
    """A scheduler would load a replica more to make it faster: one more request with its context,
    one more token of context for each, one more token of prompt, or a prompt at all. (A
    picosecond per token of context is what rounding to whole ones may do.)"""
    prefill = Prefill(tokens, chunks if tokens else 0, pairs(context, tokens), ending=0)
    now = model.step_ps(batch, batch * context, prefill)
    rounding = (batch + 1) * context
    assert model.step_ps(batch + 1, (batch + 1) * context, prefill) >= now - rounding
    assert model.step_ps(batch, batch * (context + 1), prefill) >= now
    more = Prefill(tokens + 1, chunks, pairs(context, tokens + 1), ending=0)
    assert model.step_ps(batch, batch * context, more) >= now - rounding
    assert now >= model.step_ps(batch, batch * context) - rounding


@given(profiles(), splits, batches, contexts)
def test_stages_are_never_free(
    profile: Profile, stages: tuple[int, ...], batch: int, context: int
) -> None:
    """Pipelines would beat physics: every micro-batch passes every layer, and its hops."""
    gpu, pp = small_gpu(), len(stages)
    staged = step_model(profile, gpu, Parallelism(pp=pp), stages=stages)
    single = step_model(profile, gpu, Parallelism())
    part = -(-batch // min(pp, batch))
    overheads = round(profile.overheads.request_us * 1e6) * (batch - part)
    hops = round(pp * (profile.overheads.hop_us + gpu.peer.latency_s * 1e6) * 1e6) if pp > 1 else 0
    alone = single.decode(part)
    assert staged.decode(batch).fixed_ps >= alone.fixed_ps + overheads + hops
    slope = single.decode(batch).slope_ps
    assert staged.decode(batch).slope_ps * min(pp, batch) >= slope - LAYERS * pp


@given(profiles(), batches)
def test_an_even_split_is_never_worse(profile: Profile, batch: int) -> None:
    """A planner would be led to lopsided stages."""
    gpu = small_gpu()
    even, uneven = (
        step_model(profile, gpu, Parallelism(pp=2), stages=stages).decode(batch)
        for stages in ((6, 6), (9, 3))
    )
    assert even.slope_ps <= uneven.slope_ps
    # The last stage has the head, so that it may pay to give it fewer layers, but not many.
    head = profile.times[0].head_us[-1] * (1 + batch) * 1e6
    assert even.fixed_ps <= uneven.fixed_ps + 2 * head


@given(profiles(), st.lists(st.floats(0.1, 1), min_size=5, max_size=5), batches, contexts)
def test_more_ranks_are_no_slower_if_they_were_measured_so(
    profile: Profile, shares: list[float], batch: int, context: int
) -> None:
    """tp2 would be slower than tp1 for no measured reason."""
    one = profile.times[0]
    by = iter(shares)
    faster = msgspec.structs.replace(
        one,
        tp=2,
        dense_us=tuple(value * shares[0] for value in one.dense_us),
        head_us=tuple(value * shares[1] for value in one.head_us),
        decode_context_ns=one.decode_context_ns * next(by),
    )
    both = msgspec.structs.replace(profile, times=(one, faster))
    slow, fast = (step_model(both, small_gpu(), Parallelism(tp=tp)) for tp in (1, 2))
    prefill = Prefill(100, 1, pairs(0, 100), ending=1)
    assert fast.step_ps(batch, batch * context) <= slow.step_ps(batch, batch * context)
    assert fast.step_ps(batch, context, prefill) <= slow.step_ps(batch, context, prefill)


@st.composite
def facts_of_models(draw: st.DrawFn) -> ModelFacts:
    kv_heads = draw(st.integers(1, 16))
    return ModelFacts(
        layers=LAYERS, hidden=draw(st.integers(1, 2000)),
        heads=kv_heads * draw(st.integers(1, 8)), kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 64, 128])), ffn=draw(st.integers(1, 5000)),
        vocab=draw(st.integers(1, 5000)), gated=draw(st.booleans()), tied=draw(st.booleans()),
        weight_bytes=draw(st.sampled_from([1, 2, 4])), kv_bytes=draw(st.sampled_from([1, 2])),
        positions=draw(st.integers(0, 100)),
    )  # fmt: skip


def gpu_of(memory_bytes: int) -> GpuFacts:
    return msgspec.structs.replace(
        small_gpu(), memory_bytes=memory_bytes, reserved_bytes=memory_bytes // 10
    )


@given(facts_of_models(), st.integers(1, 10**9), st.integers(1, 16), splits)
def test_capacity_is_never_negative_and_never_too_large(
    facts: ModelFacts, memory_bytes: int, tp: int, stages: tuple[int, ...]
) -> None:
    """Plans would put a model where it does not fit: what is promised must fit on each GPU."""
    profile = msgspec.structs.replace(small_profile(), model_facts=facts)
    gpu, shape = gpu_of(memory_bytes), Parallelism(tp=tp, pp=len(stages))
    tokens = kv_capacity_tokens(profile, gpu, shape, stages)
    assert tokens >= 0
    heads = max(1, facts.kv_heads // tp)  # at least, on the fullest GPU
    for weights, layers in zip(weight_bytes(facts, shape, stages), stages, strict=True):
        cache = tokens * 2 * layers * heads * facts.head_dim * facts.kv_bytes
        assert not tokens or weights + cache <= gpu.memory_bytes * gpu.usable


@given(facts_of_models(), st.integers(1, 10**9), st.sampled_from([1, 2, 4, 8]))
def test_more_memory_or_ranks_hold_no_less(facts: ModelFacts, memory_bytes: int, tp: int) -> None:
    """More GPUs would seem to hold less. (The check is per replica: a copy of KV heads may eat all
    that another rank brings, but not more.)"""
    profile = msgspec.structs.replace(small_profile(), model_facts=facts)
    now = kv_capacity_tokens(profile, gpu_of(memory_bytes), Parallelism(tp=tp))
    assert kv_capacity_tokens(profile, gpu_of(2 * memory_bytes), Parallelism(tp=tp)) >= now
    assert kv_capacity_tokens(profile, gpu_of(memory_bytes), Parallelism(tp=2 * tp)) >= now


@given(profiles())
def test_profiles_survive_their_file(profile: Profile) -> None:
    """A stored profile would predict something else than the fitted one."""
    text = dump_profile(profile)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.toml"
        write_profile(path, profile)
        assert read_profile(path) == profile
        assert dump_profile(read_profile(path)) == text == path.read_text(encoding="utf-8")


shapes = st.sampled_from(["tp2", "tp4", "tp8", "tp2pp2", "tp4pp2", "tp2pp4"])
LARGE = {
    shape: replica_model(large_profile(), large_gpu(), Parallelism.parse(shape))
    for shape in ("tp2", "tp4", "tp8", "tp2pp2", "tp4pp2", "tp2pp4")
}


@settings(deadline=None)
@given(
    shapes, st.integers(1, 60_000), st.integers(1, 3000), st.floats(0.01, 20), st.floats(0.005, 1),
    st.builds(EngineLimits, running_max=st.integers(1, 600)),
)  # fmt: skip
def test_looser_targets_sustain_no_less(
    shape: str, input_tokens: int, output_tokens: int, ttft_s: float, tpot_s: float,
    limits: EngineLimits,
) -> None:  # fmt: skip
    """A planner would tighten a target to get more out of a replica; and what it gets must keep to
    targets, memory and seats."""
    model: CostModel = LARGE[shape]

    def found(ttft_s: float, tpot_s: float) -> float:
        answer = rate(
            model, input_tokens=input_tokens, output_tokens=output_tokens, ttft_s=ttft_s,
            tpot_s=tpot_s, limits=limits,
        )  # fmt: skip
        assert answer.requests_per_s >= 0
        assert (answer.requests_per_s > 0) == (answer.batch > 0)
        if answer.batch:
            assert answer.batch <= limits.running_max
            assert answer.itl_s <= tpot_s
            assert answer.ttft_s <= ttft_s
        return answer.requests_per_s

    now = found(ttft_s, tpot_s)
    # Where prompts of one step become prompts of two, ITL has a kink: hence the hair's breadth.
    assert found(ttft_s * 1.5, tpot_s) >= now * 0.98
    assert found(ttft_s, tpot_s * 1.5) >= now * 0.98


@settings(deadline=None)
@given(shapes, st.integers(1, 6000), st.integers(2, 600), st.floats(0, 2), st.floats(0.001, 100))
def test_a_loaded_replica_is_never_faster_than_an_idle_one(
    shape: str, input_tokens: int, output_tokens: int, cv2: float, requests_per_s: float
) -> None:
    """Ranking by latency would send load where there is most of it already."""
    loaded, idle = (
        latency(
            LARGE[shape], requests_per_s=arriving, input_tokens=input_tokens,
            output_tokens=output_tokens, cv2=cv2,
        )
        for arriving in (requests_per_s, 1e-9)
    )  # fmt: skip
    assert loaded.ttft_s >= idle.ttft_s * (1 - 1e-9)
    assert loaded.tpot_s >= idle.tpot_s * (1 - 1e-9)
    assert loaded.ttft_s_p99 >= loaded.ttft_s * 0.5
    assert loaded.e2e_s >= loaded.ttft_s
