"""A made-up kind of GPU with made-up profiles, and problems on it, for tests of policies.

``big`` has the dimensions of a 70B model, ``small`` of an 8B one; times are what an ideal GPU of
80 GB, 3.35 TB/s and 600 TFLOP/s would take.
"""

from pathlib import Path

import pytest

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from services.scheduler.policies.weights import equal
from shared.cost import library
from shared.cost.files import write_gpu, write_profile
from shared.cost.limits import EngineLimits
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
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.slo import SloTarget

KIND = "made-up"
EMPTY = DeploymentPlan(plan_id="none")
TARGET = SloTarget(ttft_s=2.0, tpot_s=0.1)
TOKENS = (1, 64, 256, 2048)
BIG = ModelFacts(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=32000)
SMALL = ModelFacts(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)


def write_profiles(folder: Path) -> None:
    link = Link(bytes_per_s=2e11, latency_s=1e-5)
    gpu = GpuFacts(
        gpu=KIND, memory_bytes=80 * 2**30, usable=0.95, reserved_bytes=4 * 2**30,
        gpus_per_node=8, price_per_hour=2.0, local=link, peer=link, host=link, network=link,
        disk=link, engine_start_s=10.0,
    )  # fmt: skip
    write_gpu(folder / KIND / "gpu.toml", gpu)
    for name, facts in (("big", BIG), ("small", SMALL)):
        profile = Profile(
            format=FORMAT, gpu=KIND, model=name, model_facts=facts,
            times=tuple(_times(facts, tp) for tp in (1, 2, 4, 8)),
            overheads=Overheads(step_us=500.0, request_us=5.0),
            error=ErrorBar(step_median=0.1, step_p90=0.2, ttft_p90=0.2, itl_p90=0.2),
        )  # fmt: skip
        write_profile(folder / KIND / f"{name}.toml", profile)


def _times(facts: ModelFacts, tp: int) -> TensorTimes:
    weights = 2 * facts.hidden * (facts.hidden + 1024) + 3 * facts.hidden * facts.ffn
    read_us, token_us = 2e6 * weights / 3.35e12 / tp, 2e6 * weights / 6e14 / tp
    return TensorTimes(
        tp=tp, tokens=TOKENS, dense_us=tuple(max(read_us, token_us * n) for n in TOKENS),
        collective_us=tuple((10.0 + 0.05 * n) * (tp > 1) for n in TOKENS),
        head_us=tuple(300.0 / tp + 0.1 * n for n in TOKENS),
        decode_us=5.0, decode_request_us=0.1, decode_context_ns=4096 / 3.35e3 / tp,
        prefill_chunk_us=5.0, prefill_pair_ns=0.06 / tp,
    )  # fmt: skip


@pytest.fixture(scope="session", name="profiles")
def made_up_profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    write_profiles(folder)
    return folder


@pytest.fixture
def shipped(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up profiles in place of those that are shipped."""
    monkeypatch.setattr(library, "SHIPPED", profiles)


def offers(*sizes: int) -> tuple[GpuOffer, ...]:
    """Nodes of so many GPUs."""
    return tuple(
        GpuOffer(gpu_id=f"n{n}-g{g}", node_id=f"n{n}", kind=KIND)
        for n, size in enumerate(sizes)
        for g in range(size)
    )


def demand(model_id: str, *types: tuple[float, float, float]) -> ModelDemand:
    """Types as (requests/s, input tokens, output tokens)."""
    return ModelDemand(
        model_id=model_id,
        types=tuple(
            TypeForecast(
                request_type=number,
                arrivals_rps=rps,
                input_tokens_mean=inputs,
                output_tokens_mean=outputs,
            )
            for number, (rps, inputs, outputs) in enumerate(types)
        ),
        horizon_s=60.0,
    )


def in_force(*replicas: tuple[str, str, str, str]) -> DeploymentPlan:
    """Replicas as (id, model, shape, GPUs such as ``n0-g0 n0-g1``), with equal weights."""
    specs = tuple(
        ReplicaSpec(replica_id=id_, model_id=model, parallelism=shape, gpus=tuple(gpus.split()))
        for id_, model, shape, gpus in replicas
    )
    return make_plan(specs, equal(specs), reason="test")


def problem(
    *demands: ModelDemand,
    on: tuple[GpuOffer, ...],
    plan: DeploymentPlan = EMPTY,
    now_s: float = 0.0,
) -> Problem:
    """Models are profiled under their own names."""
    return Problem(
        now_s=now_s,
        epoch=1,
        models=demands,
        offers=on,
        in_force=plan,
        kinds={offer.gpu_id: offer.kind for offer in on},
        profiles={d.model_id: d.model_id for d in demands},
        targets={d.model_id: TARGET for d in demands},
        limits=EngineLimits(),
    )
