"""What the simpler policies ask of the cost model: which shapes fit, what one replica serves, and
how fast it is at a given load."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log

from services.scheduler.policies.interface import GpuOffer, ModelDemand
from shared.cost.files import ProfileInvalid
from shared.cost.latency import Latency, latency
from shared.cost.limits import EngineLimits
from shared.cost.memory import weight_bytes
from shared.cost.model import CostModel, cost_model
from shared.cost.rates import Rate, rate
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.slo import SloTarget

RANKS = (1, 2, 4, 8)
STAGES = (1, 2, 4)
STEP = 0.05
"""Lengths and loads are rounded to steps of 5 %: well within the error of any rate, and one is
worked out once for the many forecasts that hardly differ."""
LENGTH_MAX = 1 << 20
NOMINAL = (1024.0, 256.0)
"""Input and output tokens by which a model is judged of which nothing is expected."""
ANY_TARGET = SloTarget(ttft_s=3600.0, tpot_s=60.0)
"""What a model is planned by that no shape on offer can serve within its target."""


@dataclass(frozen=True, slots=True)
class Mix:
    """All that one model is expected to get, as its mean request."""

    arrivals_rps: float
    input_tokens: float
    output_tokens: float


def mix_of(demand: ModelDemand) -> Mix:
    """The mean request, weighted by arrivals; nominal lengths where nothing is expected."""
    rps = demand.arrivals_rps
    if rps <= 0.0:
        return Mix(0.0, *NOMINAL)
    inputs = sum(kind.arrivals_rps * kind.input_tokens_mean for kind in demand.types)
    outputs = sum(kind.arrivals_rps * kind.output_tokens_mean for kind in demand.types)
    return Mix(rps, inputs / rps, outputs / rps)


def node_gpus(offers: Iterable[GpuOffer]) -> dict[str, int]:
    """GPUs of the largest node of each kind."""
    sizes = Counter((offer.kind, offer.node_id) for offer in offers)
    return {
        kind: max(size for (of, _), size in sizes.items() if of == kind)
        for kind in sorted({kind for kind, _ in sizes})
    }


def known(kind: str, profile: str, shape: Parallelism, node_size: int) -> CostModel | None:
    """The cost model of a shape on nodes of ``node_size`` GPUs; None if it does not fit, was not
    measured, or needs a tensor-parallel group across nodes. Raises ProfileInvalid for a bad
    file."""
    if shape.tp > node_size:
        return None
    nodes = -(-shape.gpus // (node_size // shape.tp * shape.tp))
    try:
        return cost_model(kind, profile, shape, nodes=nodes)
    except ProfileInvalid:
        raise
    except ConfigInvalid:
        return None


def shapes(kind: str, profile: str, offers: Iterable[GpuOffer]) -> dict[Parallelism, CostModel]:
    """Shapes that fit, the fewest GPUs and then the fewest stages first, and that there are GPUs
    enough of the ``kind`` for."""
    mine = [offer for offer in offers if offer.kind == kind]
    size = node_gpus(mine).get(kind, 0)
    asked = sorted((Parallelism(tp, pp) for tp in RANKS for pp in STAGES), key=_size)
    found = {s: known(kind, profile, s, size) for s in asked if s.gpus <= len(mine)}
    return {shape: model for shape, model in found.items() if model is not None}


def _size(shape: Parallelism) -> tuple[int, int]:
    return shape.gpus, shape.pp


def kv_share(model: CostModel) -> float:
    """The share of the GPUs' memory that is left for KV cache on the fullest of them."""
    budget = (model.gpu.memory_bytes - model.gpu.reserved_bytes) * model.gpu.usable
    weights = max(weight_bytes(model.profile.model_facts, model.shape, model.stages))
    return (budget - weights) / model.gpu.memory_bytes


def served(
    model: CostModel, lengths: tuple[float, float], target: SloTarget, limits: EngineLimits
) -> Rate:
    """What one replica serves of requests of (input, output) tokens within ``target``."""
    return rate(
        model,
        input_tokens=_rounded(lengths[0]),
        output_tokens=_rounded(lengths[1]),
        ttft_s=target.ttft_s,
        tpot_s=target.tpot_s,
        limits=limits,
    )


def speed(
    model: CostModel, lengths: tuple[float, float], requests_per_s: float, limits: EngineLimits
) -> Latency:
    """How fast one replica serves that load; infinite times beyond what it can bear."""
    return latency(
        model,
        requests_per_s=_step(requests_per_s),
        input_tokens=_rounded(lengths[0]),
        output_tokens=_rounded(lengths[1]),
        limits=limits,
    )


def _rounded(tokens: float) -> int:
    return max(1, round(_step(min(max(tokens, 1.0), LENGTH_MAX))))


def _step(value: float) -> float:
    """The nearest on a scale of steps of ``STEP``."""
    return exp(round(log(value) / STEP) * STEP) if value > 0.0 else 0.0
