"""What is planned for: every type of every model with its arrivals, lengths and target."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from services.scheduler.policies.costs import ANY_TARGET, NOMINAL
from services.scheduler.policies.interface import Problem
from shared.messages.demand import TypeForecast
from shared.slo import DEFAULT_TARGETS, SloTarget

CLASS_SHARE_MIN = 0.1  # of a type's requests: a rarer SLO class does not set its target
ARRIVALS_MIN = 1e-6  # requests/s: every type has some, also where a quantile is 0

Quantile = Literal["p10", "p90"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeDemand:
    """A type of one model; ``name`` is that of its row of weights. ``target``: what its requests
    are planned to meet; ``class_shares``: of its requests by SLO class, empty where nothing is
    said."""

    model_id: str
    name: str
    arrivals_rps: float
    input_tokens: float
    output_tokens: float
    target: SloTarget = DEFAULT_TARGETS["standard"]
    class_shares: Mapping[str, float] = field(default_factory=dict[str, float])


def types_of(
    problem: Problem,
    *,
    target: SloTarget | None = None,
    caution: float = 0.0,
    quantile: Quantile | None = None,
) -> tuple[TypeDemand, ...]:
    """The types of all models, in their order; one of nominal lengths for each model where nothing
    is expected at all. ``target``, ``caution`` and ``quantile`` are those of ``capacity.build``."""
    found = tuple(
        TypeDemand(
            model_id=model.model_id,
            name=str(kind.request_type),
            arrivals_rps=_arrivals_rps(kind, caution, quantile),
            input_tokens=kind.input_tokens_mean,
            output_tokens=kind.output_tokens_mean,
            target=target or class_target(problem, model.model_id, kind.class_shares),
            class_shares=kind.class_shares,
        )
        for model in problem.models
        for kind in model.types
        if kind.arrivals_rps > 0
    )
    return found or tuple(_nominal(model.model_id, problem, target) for model in problem.models)


def class_target(problem: Problem, model_id: str, class_shares: Mapping[str, float]) -> SloTarget:
    """What a type of the model is planned to meet: the targets of every SLO class that at least
    ``CLASS_SHARE_MIN`` of its requests are of. The model's own is that of "standard", of classes
    nobody has heard of, and of requests of which nothing is said."""
    own = problem.targets[model_id]
    frequent = [name for name, share in class_shares.items() if share >= CLASS_SHARE_MIN]
    return strictest(
        [
            own if name == "standard" else problem.class_targets.get(name, own)
            for name in frequent or ["standard"]
        ]
    )


def strictest(targets: Iterable[SloTarget]) -> SloTarget:
    """What meets all of ``targets``, of which there is at least one."""
    every = list(targets)
    return SloTarget(
        ttft_s=min(target.ttft_s for target in every),
        tpot_s=min(target.tpot_s for target in every),
    )


def looser(aimed: SloTarget, own: SloTarget) -> list[SloTarget]:
    """What a type is planned by, in turn, until some column serves it: its target, the model's
    ``own`` if that asks for less, and none."""
    ladder = [aimed, ANY_TARGET]
    if own != aimed and own.ttft_s >= aimed.ttft_s and own.tpot_s >= aimed.tpot_s:
        ladder.insert(1, own)
    return ladder


def _arrivals_rps(kind: TypeForecast, caution: float, quantile: Quantile | None) -> float:
    """What a type is planned for; a quantile that is no number counts as not given."""
    given = {"p10": kind.arrivals_rps_p10, "p90": kind.arrivals_rps_p90}
    rps = given[quantile] if quantile else None
    if rps is not None and isfinite(rps):
        return max(ARRIVALS_MIN, rps)
    return kind.arrivals_rps + caution * max(0.0, kind.error_rps_mae or 0.0)


def _nominal(model_id: str, problem: Problem, target: SloTarget | None) -> TypeDemand:
    return TypeDemand(
        model_id=model_id,
        name="*",
        arrivals_rps=1.0,
        input_tokens=NOMINAL[0],
        output_tokens=NOMINAL[1],
        target=target or problem.targets[model_id],
    )
