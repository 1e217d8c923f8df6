"""The models, mixes and plans of ``bench_predictions``."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from shared.cost.limits import EngineLimits
from shared.hardware import Parallelism
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.slo import DEFAULT_TARGETS

KIND, NODE_GPUS = "h100", 8
TARGET = DEFAULT_TARGETS["standard"]
HORIZON_S = 300.0
Mix = tuple[tuple[float, float, float], ...]  # of each type: weight, tokens in, tokens out


@dataclass(frozen=True, slots=True)
class Ground:
    """A model on some GPUs, and plans of unlike shapes for it."""

    model: str
    gpus: int
    unlike: tuple[tuple[tuple[str, int], ...], ...]
    mixes: Mapping[str, Mix]


GROUNDS = (
    Ground(
        "llama-2-70b",
        16,
        ((("tp8", 1), ("tp4", 2)), (("tp4", 2), ("tp2", 4)), (("tp8", 1), ("tp4", 1), ("tp2", 2))),
        {
            "chat": ((3.0, 400.0, 120.0), (2.0, 1200.0, 320.0), (1.0, 2300.0, 40.0)),
            "long prompts": ((1.0, 4000.0, 60.0), (2.0, 700.0, 150.0)),
            "long answers": ((1.0, 200.0, 800.0), (1.0, 600.0, 250.0)),
            "alike": ((1.0, 1000.0, 200.0),),
        },
    ),
    Ground(
        "llama-3.1-8b",
        4,
        ((("tp2", 1), ("tp1", 2)),),
        {
            "chat": ((3.0, 400.0, 120.0), (2.0, 1200.0, 320.0), (1.0, 2300.0, 40.0)),
            "long prompts": ((1.0, 4000.0, 60.0), (2.0, 700.0, 150.0)),
        },
    ),
)


def problem(ground: Ground, mix: Mix, arrivals_rps: float) -> Problem:
    """``mix`` at ``arrivals_rps`` in all, and nothing in force."""
    total = sum(weight for weight, _, _ in mix)
    types = tuple(
        TypeForecast(
            request_type=j,
            arrivals_rps=arrivals_rps * weight / total,
            input_tokens_mean=tokens_in,
            output_tokens_mean=tokens_out,
        )
        for j, (weight, tokens_in, tokens_out) in enumerate(mix)
    )
    offers = tuple(
        GpuOffer(gpu_id=f"g{i:03d}", node_id=f"n{i // NODE_GPUS}", kind=KIND)
        for i in range(ground.gpus)
    )
    return Problem(
        now_s=0.0,
        epoch=1,
        models=(ModelDemand(model_id=ground.model, horizon_s=HORIZON_S, types=types),),
        offers=offers,
        in_force=DeploymentPlan(plan_id="none"),
        kinds={offer.gpu_id: KIND for offer in offers},
        profiles={ground.model: ground.model},
        targets={ground.model: TARGET},
        limits=EngineLimits(),
    )


def plans(ground: Ground, table: Table) -> Iterator[Counter[Column]]:
    """Every uniform shape that fits the GPUs without rest, then the unlike ones."""
    by_shape = {column.shape: column for column in table.columns}
    for shape, column in by_shape.items():
        if ground.gpus % shape.gpus == 0 and table.rates[table.columns.index(column)].all():
            yield Counter({column: ground.gpus // shape.gpus})
    for unlike in ground.unlike:
        yield Counter({by_shape[Parallelism.parse(shape)]: count for shape, count in unlike})


def equal_weights(table: Table, counts: Counter[Column]) -> Array:
    """Shares [S, J] by which every replica gets as much."""
    each = np.array([counts[column] / counts.total() for column in table.columns])
    return np.repeat(each[:, None], len(table.types), axis=1)


def utilisation(table: Table, counts: Counter[Column], shares: Array) -> float:
    """Of the replicas that have least to spare."""
    return max(
        float(np.sum(table.demand * shares[s] / table.rates[s])) / counts[column]
        for s, column in enumerate(table.columns)
        if counts[column]
    )
