"""Asks the production policy for a plan, with what a command line knows in place of a mesh."""

from collections import Counter
from collections.abc import Callable, Collection
from time import perf_counter
from typing import Literal

import msgspec

from loadgen.planning.demand import Expected
from loadgen.planning.machine import Site, price_per_hour
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import engine_limits
from services.scheduler.policies.capacity import Column, build, kind_of
from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.interface import GpuOffer, Needs, Planned, Policy, Problem
from services.scheduler.policies.registry import make_policy
from services.scheduler.policies.verify import verify
from shared.errors import OServeError
from shared.hardware import Parallelism
from shared.messages.decisions import Decision
from shared.messages.plans import DeploymentPlan
from shared.slo import SloClass, SloTarget

NOTHING = DeploymentPlan(plan_id="none")
USUAL: SloClass = "standard"
SERVED_ENOUGH = 1.0 - 1e-6  # headroom of a plan that carries the demand: rounding

Change = Literal["new", "none", "weights", "replicas"]
"""What a plan changes of the one in force: all, where nothing is; nothing; weights alone; or which
replicas there are."""

MakePolicy = Callable[[SchedulerConfig], Policy]


class TypeName(msgspec.Struct, frozen=True, kw_only=True):
    """What the type ``request_type`` of a model is called in the demand."""

    model_id: str
    request_type: str
    name: str


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """n[shape, type]: what one replica serves within its targets if it sees this type alone."""

    model_id: str
    gpu_kind: str
    parallelism: str
    request_type: str
    requests_per_s: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, and what the policy said. ``gpus`` and ``demand`` are words; ``horizon_s`` is
    for how long the demand is taken to last. ``targets``: by SLO class, of those expected, and by
    model where one has its own. ``plan`` is None when nothing can be placed; ``brief`` are its
    replicas, such as ``2 x tp4``, and ``price_per_hour`` is that of the GPUs that it uses.
    ``change``: from the plan in force. ``missing``: what cannot be served, and what it would take;
    empty when the plan carries the demand."""

    topology: str
    gpus: str
    demand: str
    horizon_s: float
    notes: tuple[str, ...]
    price_per_hour: float
    targets: dict[str, SloTarget]
    types: tuple[TypeName, ...]
    plan: DeploymentPlan | None
    brief: str
    decision: Decision
    reason: str
    change: Change
    missing: tuple[str, ...]
    took_s: float

    @property
    def feasible(self) -> bool:
        return not self.missing

    def type_name(self, model_id: str, number: str) -> str:
        """The name of a type, its number where it has none."""
        for kind in self.types:
            if (kind.model_id, kind.request_type) == (model_id, number):
                return kind.name
        return number


class PlanImpossible(OServeError):
    """The policy gave no answer that can be shown."""


def ask(
    site: Site,
    expected: Expected,
    *,
    in_force: DeploymentPlan = NOTHING,
    topology: str = "",
    make: MakePolicy = make_policy,
) -> Answer:
    """The plan for what is expected. Raises PlanImpossible for an answer without figures or one
    that the scheduler would refuse."""
    problem = problem_of(site, expected, in_force)
    policy = make(site.scheduler)
    began = perf_counter()
    planned = policy.plan(problem)
    took_s = perf_counter() - began
    _check(planned, problem)
    decision = planned.decision or Decision(policy=site.scheduler.policy)
    return Answer(
        topology=topology,
        gpus=site.brief(),
        demand=expected.source,
        horizon_s=max((model.horizon_s for model in expected.models), default=0.0),
        notes=_notes(problem, expected, in_force),
        price_per_hour=price_per_hour(site, _gpus(planned.plan)),
        targets=_targets(problem),
        types=_type_names(expected),
        plan=planned.plan,
        brief=_brief(planned.plan, problem),
        decision=decision,
        reason=planned.reason,
        change=_change(planned.plan, in_force),
        missing=_missing(planned, decision),
        took_s=took_s,
    )


def problem_of(site: Site, expected: Expected, in_force: DeploymentPlan) -> Problem:
    """As the scheduler would put it, all GPUs on offer and the replicas in force settled."""
    mesh, config = site.mesh, site.scheduler
    targets = config.targets or {}
    return Problem(
        now_s=0.0,
        epoch=0,
        models=expected.of(mesh.model_ids).models,
        offers=_offers(site),
        in_force=in_force,
        wishes=mesh.replicas,
        kinds={gpu.gpu_id: gpu.kind for gpu in mesh.gpus()},
        profiles={model.model_id: model.profile_name for model in mesh.models},
        targets={name: targets.get(name, config.target) for name in mesh.model_ids},
        limits=engine_limits(mesh.engine),
        class_targets=config.targets_by_class,
        needs=Needs(
            replicas_min=config.replicas_min or {},
            survive=config.survive,
            elastic=config.elastic,
            gpu_prices=config.gpu_prices or {},
        ),
        time_limit_s=config.solve_timeout_s,
    )


def rates_of(site: Site, expected: Expected) -> tuple[Rate, ...]:
    """n[shape, type] of all shapes that fit, as the policy is told."""
    problem, source = problem_of(site, expected, NOTHING), CostRates()
    table = build(problem, source)
    return tuple(
        Rate(
            model_id=kind.model_id,
            gpu_kind=kind_of(column, problem, table.pools).gpu,
            parallelism=str(column.shape),
            request_type=kind.name,
            requests_per_s=float(table.rates[s, j]),
        )
        for j, kind in enumerate(table.types)
        for s, column in enumerate(table.columns)
        if column.model_id == kind.model_id
    )


def _offers(site: Site) -> tuple[GpuOffer, ...]:
    offers = [
        GpuOffer(gpu_id=gpu.gpu_id, node_id=node.node_id, kind=gpu.kind)
        for node in site.mesh.nodes
        for gpu in node.gpu_specs()
    ]
    return tuple(sorted(offers, key=lambda offer: offer.gpu_id))


def _check(planned: Planned, problem: Problem) -> None:
    """The scheduler's own check, as it would be made before the plan is asked for."""
    if planned.plan is None:
        return
    if planned.decision is None:
        raise PlanImpossible("the policy gave a plan without figures")
    models = [model.model_id for model in problem.models]
    wrong = verify(planned.plan, problem.offers, models)
    if wrong:
        raise PlanImpossible(f"the plan computed cannot be: {'; '.join(wrong)}")


def _missing(planned: Planned, decision: Decision) -> tuple[str, ...]:
    if decision.missing:
        return decision.missing
    if planned.plan is None:
        return (planned.reason,)
    chosen = decision.chosen
    if chosen is not None and chosen.headroom < SERVED_ENOUGH:
        short = (
            f"the GPUs carry {chosen.headroom:.3g} times the demand within its targets: add GPUs, "
            "take less of it, or allow slower answers (scheduler.target)"
        )
        return (short,)
    return ()


def _change(plan: DeploymentPlan | None, in_force: DeploymentPlan) -> Change:
    if not in_force.replicas:
        return "new"
    if plan is None or plan.plan_id == in_force.plan_id:
        return "none"
    return "weights" if set(plan.replicas) == set(in_force.replicas) else "replicas"


def _brief(plan: DeploymentPlan | None, problem: Problem) -> str:
    replicas = plan.replicas if plan else ()
    return brief(
        Counter(
            Column(spec.model_id, problem.kinds[spec.gpus[0]], Parallelism.parse(spec.parallelism))
            for spec in replicas
        )
    )


def _gpus(plan: DeploymentPlan | None) -> list[str]:
    return [gpu for spec in plan.replicas for gpu in spec.gpus] if plan else []


def _targets(problem: Problem) -> dict[str, SloTarget]:
    """Those that count for what is expected, by class; a model's own under its name."""
    usual = problem.class_targets[USUAL]
    found: dict[str, SloTarget] = {}
    for model in problem.models:
        own = problem.targets[model.model_id]
        for kind in model.types:
            for name in kind.class_shares or (USUAL,):
                if name != USUAL:
                    found[name] = problem.class_targets.get(name, own)
                elif own == usual:
                    found[USUAL] = own
                else:
                    found[f"{USUAL} of {model.model_id}"] = own
    return found


def _type_names(expected: Expected) -> tuple[TypeName, ...]:
    return tuple(
        TypeName(
            model_id=model.model_id,
            request_type=str(kind.request_type),
            name=expected.name(model.model_id, str(kind.request_type)),
        )
        for model in expected.models
        for kind in model.types
    )


def _notes(problem: Problem, expected: Expected, in_force: DeploymentPlan) -> tuple[str, ...]:
    notes = list(expected.notes)
    for model in problem.models:
        if not model.types:
            least = problem.needs.replicas_min.get(model.model_id, 1)
            notes.append(
                f"{model.model_id}: nothing is expected; scheduler.replicas_min keeps {least} of it"
            )
    notes += _lost(in_force, problem.kinds)
    return tuple(notes)


def _lost(in_force: DeploymentPlan, known: Collection[str]) -> list[str]:
    gone = [
        spec.replica_id for spec in in_force.replicas if any(gpu not in known for gpu in spec.gpus)
    ]
    if not gone:
        return []
    return [f"of the plan in force, GPUs of {', '.join(gone)} are not in the topology: it is lost"]
