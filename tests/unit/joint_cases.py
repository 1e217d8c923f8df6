"""Made-up GPUs, profiles and tables for tests of the planners."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from services.scheduler.policies.capacity import (
    Column,
    ReplicaKind,
    Table,
    TypeDemand,
    pools,
)
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel, replica_model
from shared.cost.profile import (
    ErrorBar,
    GpuFacts,
    Link,
    ModelFacts,
    Overheads,
    Profile,
    TensorTimes,
)
from shared.cost.rates import rate
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.slo import SloTarget

GPU = GpuFacts(
    gpu="h100",
    memory_bytes=80 * 10**9,
    usable=0.92,
    reserved_bytes=4 * 10**9,
    gpus_per_node=8,
    price_per_hour=3.0,
    local=Link(bytes_per_s=2e12, latency_s=2e-6),
    peer=Link(bytes_per_s=4e11, latency_s=5e-6),
    host=Link(bytes_per_s=5e10, latency_s=1e-5),
    network=Link(bytes_per_s=2e10, latency_s=1e-5),
    disk=Link(bytes_per_s=5e9, latency_s=1e-3),
    engine_start_s=20.0,
)
FACTS = {
    "llama-2-70b": ModelFacts(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=32000
    ),
    "llama-3.1-8b": ModelFacts(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
    ),
}
TOKENS = (1, 64, 256, 1024, 2048, 8192)
EMPTY = DeploymentPlan(plan_id="none")
TARGET = SloTarget(ttft_s=2.0, tpot_s=0.1)


@cache
def profile(name: str) -> Profile:
    """A roofline of a GPU of 3 TB/s and 600 TFLOP/s, with all-reduces at 200 GB/s."""
    facts = FACTS[name]
    params = facts.hidden * (2 * facts.heads + 2 * facts.kv_heads) * facts.head_dim
    params += 3 * facts.hidden * facts.ffn
    head = facts.hidden * facts.vocab
    times = tuple(
        TensorTimes(
            tp=tp,
            tokens=TOKENS,
            dense_us=tuple(
                max(2 * params / tp / 3e6, 2 * params * m / tp / 6e8) + 8 for m in TOKENS
            ),
            collective_us=tuple(
                0.0 if tp == 1 else 2 * (8 + 2 * facts.hidden * m / 2e5) for m in TOKENS
            ),
            head_us=tuple(max(2 * head / tp / 3e6, 2 * head * m / tp / 6e8) for m in TOKENS),
            decode_us=4.0,
            decode_request_us=0.02,
            decode_context_ns=4 * facts.kv_heads * facts.head_dim / tp / 2.5e3,
            prefill_chunk_us=5.0,
            prefill_pair_ns=4 * facts.heads * facts.head_dim / tp / 4e5,
        )
        for tp in (1, 2, 4, 8)
    )
    return Profile(
        format=1,
        gpu="h100",
        model=name,
        model_facts=facts,
        times=times,
        overheads=Overheads(step_us=400.0, request_us=5.0, chunk_us=20.0, hop_us=10.0),
        error=ErrorBar(step_median=0.1, step_p90=0.2, ttft_p90=0.2, itl_p90=0.2),
    )


@cache
def model_of(kind: ReplicaKind) -> CostModel | None:
    nodes = -(-kind.shape.gpus // kind.node_gpus)
    try:
        return replica_model(profile(kind.profile), GPU, kind.shape, nodes=nodes)
    except ConfigInvalid:
        return None


class MadeUpRates:
    """A source over the profiles above, through the real cost model."""

    def fits(self, kind: ReplicaKind) -> bool:
        return kind.profile in FACTS and model_of(kind) is not None

    def requests_per_s(
        self,
        kind: ReplicaKind,
        lengths: tuple[float, float],
        target: SloTarget,
        limits: EngineLimits,
    ) -> float:
        return rate(
            self.model(kind),
            input_tokens=lengths[0],
            output_tokens=lengths[1],
            ttft_s=target.ttft_s,
            tpot_s=target.tpot_s,
            limits=limits,
        ).requests_per_s

    def model(self, kind: ReplicaKind) -> CostModel:
        model = model_of(kind)
        assert model is not None
        return model


def offers(count: int, *, per_node: int = 8, kind: str = "h100") -> tuple[GpuOffer, ...]:
    return tuple(
        GpuOffer(gpu_id=f"{kind}-{i:03d}", node_id=f"{kind}-node{i // per_node}", kind=kind)
        for i in range(count)
    )


def problem(
    demand: Mapping[str, Sequence[tuple[float, float, float]]],
    gpus: tuple[GpuOffer, ...],
    *,
    in_force: DeploymentPlan = EMPTY,
    target: SloTarget = TARGET,
) -> Problem:
    """``demand``: (requests/s, tokens in, tokens out) of each type, by model."""
    models = tuple(
        ModelDemand(
            model_id=model_id,
            horizon_s=60.0,
            types=tuple(
                TypeForecast(
                    request_type=i,
                    arrivals_rps=rps,
                    input_tokens_mean=tokens_in,
                    output_tokens_mean=tokens_out,
                )
                for i, (rps, tokens_in, tokens_out) in enumerate(types)
            ),
        )
        for model_id, types in demand.items()
    )
    return Problem(
        now_s=0.0,
        epoch=1,
        models=models,
        offers=gpus,
        in_force=in_force,
        kinds={offer.gpu_id: offer.kind for offer in gpus},
        profiles={model_id: model_id for model_id in demand},
        targets=dict.fromkeys(demand, target),
        limits=EngineLimits(),
    )


def table(
    rates: Mapping[tuple[str, str], Sequence[float]],
    demand: Mapping[str, Sequence[float]],
    gpus: tuple[GpuOffer, ...],
) -> Table:
    """A table of made-up ``rates`` by (model, shape) and ``demand`` by model, on one pool."""
    known = pools(gpus)
    (pool,) = known
    types = tuple(
        TypeDemand(
            model_id=model_id,
            name=str(i),
            arrivals_rps=rps,
            input_tokens=100.0,
            output_tokens=100.0,
        )
        for model_id, rps_by_type in demand.items()
        for i, rps in enumerate(rps_by_type)
    )
    columns = {
        Column(model_id, pool, Parallelism.parse(shape)): row
        for (model_id, shape), row in rates.items()
    }
    matrix = np.zeros((len(columns), len(types)))
    for s, column in enumerate(sorted(columns)):
        own = [j for j, kind in enumerate(types) if kind.model_id == column.model_id]
        matrix[s, own] = columns[column]
    return Table(pools=known, columns=tuple(sorted(columns)), types=types, rates=matrix)
