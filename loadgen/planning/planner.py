"""Asks the production policy for a plan, with what a command line knows in place of a mesh."""

from collections import Counter
from collections.abc import Callable, Collection
from time import perf_counter

from loadgen.planning.answer import Answer, Change, Rate, TypeName
from loadgen.planning.demand import Expected
from loadgen.planning.machine import Site, price_per_hour
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import engine_limits
from services.scheduler.policies.capacity import Column, build, kind_of
from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.interface import GpuOffer, Needs, Planned, Policy, Problem
from services.scheduler.policies.joint_policy import OServe
from services.scheduler.policies.verify import verify
from shared.errors import OServeError
from shared.hardware import Parallelism
from shared.messages.decisions import Decision
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.slo import SloClass, SloTarget

NOTHING = DeploymentPlan(plan_id="none")
USUAL: SloClass = "standard"
SERVED_ENOUGH = 1.0 - 1e-6  # headroom of a plan that carries the demand: rounding

NONE_FITS = (
    "a plan: add GPUs, take GPUs with more memory, or a profile with smaller weights, such as fp8; "
    "--explain and --what-if tell what suffices"
)

MakePolicy = Callable[[SchedulerConfig, float], Policy]


class PlanImpossible(OServeError):
    """The policy gave no answer that can be shown."""


def production(config: SchedulerConfig, horizon_s: float) -> Policy:
    """The scheduler's, with nothing to remember. A mesh learns how long its demand stays as it is;
    here it was said, and plans have to pay within that."""
    return OServe(payback_s=horizon_s, switch_s=config.switch_s or None)


def ask(
    site: Site,
    expected: Expected,
    *,
    in_force: DeploymentPlan = NOTHING,
    topology: str = "",
    make: MakePolicy = production,
) -> Answer:
    """The plan for what is expected; ``make`` gives the policy, told for how many seconds that is.
    Raises PlanImpossible for an answer without figures or one that the scheduler would refuse."""
    problem = problem_of(site, expected, in_force)
    policy = make(site.scheduler, expected.horizon_s)
    began = perf_counter()
    planned = policy.plan(problem)
    took_s = perf_counter() - began
    _check(planned, problem)
    decision = planned.decision or Decision(policy=site.scheduler.policy)
    return Answer(
        topology=topology,
        gpus=site.brief(),
        demand=expected.source,
        horizon_s=expected.horizon_s,
        arrivals_rps=expected.arrivals_rps,
        survive=problem.needs.survive,
        priced=bool(problem.needs.gpu_prices),
        notes=_notes(site, problem, expected, in_force),
        price_per_hour=price_per_hour(site, _gpus(planned.plan)),
        targets=_targets(problem),
        types=_type_names(expected),
        plan=planned.plan,
        brief=_brief(planned.plan, problem),
        shapes=tuple(
            sorted({(problem.kinds[s.gpus[0]], s.parallelism) for s in _replicas(planned.plan)})
        ),
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
    if planned.plan is None:
        return (*(decision.missing or (planned.reason,)), NONE_FITS)
    if decision.missing:
        return decision.missing
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
    return brief(
        Counter(
            Column(spec.model_id, problem.kinds[spec.gpus[0]], Parallelism.parse(spec.parallelism))
            for spec in _replicas(plan)
        )
    )


def _replicas(plan: DeploymentPlan | None) -> tuple[ReplicaSpec, ...]:
    return plan.replicas if plan else ()


def _gpus(plan: DeploymentPlan | None) -> list[str]:
    return [gpu for spec in _replicas(plan) for gpu in spec.gpus]


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


def _notes(
    site: Site, problem: Problem, expected: Expected, in_force: DeploymentPlan
) -> tuple[str, ...]:
    notes = list(expected.notes)
    for model in problem.models:
        if not model.types:
            least = problem.needs.replicas_min.get(model.model_id, 1)
            notes.append(
                f"{model.model_id}: nothing is expected; scheduler.replicas_min keeps {least} of it"
            )
        limit = site.mesh.model_of(model.model_id).context_tokens_max
        for kind in model.types:
            tokens = kind.input_tokens_mean + kind.output_tokens_mean
            if tokens > limit:
                name = expected.name(model.model_id, str(kind.request_type))
                notes.append(
                    f"{model.model_id} {name}: {tokens:,.0f} tokens are more than the context of "
                    f"{limit:,} (context_tokens_max): a mesh refuses such requests"
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
