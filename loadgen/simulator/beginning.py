"""The replicas that a policy itself plans for a demand, before anything runs.

What an operator does who has a trace of the past: ask the policy once, and start what it says.
The policy is the production one, told of all GPUs and of no plan in force, so that no switch is
weighed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loadgen.simulator.demand import Demand
from loadgen.simulator.deployments import Deployment, wished_words
from loadgen.simulator.site import Site
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import engine_limits
from services.scheduler.policies.interface import ModelDemand, Needs, PastWindow, Problem
from services.scheduler.policies.registry import make_policy
from shared.mesh import ReplicaWish
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan

Past = Mapping[str, Sequence[tuple[float, Mapping[int, float]]]]


def planned(
    site: Site,
    config: SchedulerConfig,
    demand: Sequence[Demand],
    *,
    horizon_s: float,
    past: Past | None = None,
) -> Deployment | None:
    """The replicas for ``demand``, which is taken to last ``horizon_s``; None if the policy plans
    nothing for it. ``past``: by model, seconds and requests/s of each of its types, by its place
    in ``demand`` among the model's, of windows in their order."""
    if not demand:
        return None
    problem = replace(_problem(site, config, demand, horizon_s), history=_history(past or {}))
    answer = make_policy(config).plan(problem)
    if answer.plan is None or not answer.plan.replicas:
        return None
    wishes = tuple(
        ReplicaWish(
            replica_id=spec.replica_id,
            model_id=spec.model_id,
            parallelism=spec.parallelism,
            gpus=spec.gpus,
        )
        for spec in answer.plan.replicas
    )
    name = wished_words(Deployment("", wishes).on(site.mesh))
    return Deployment(name, wishes)


def _history(past: Past) -> dict[str, tuple[PastWindow, ...]]:
    return {
        model_id: tuple(
            PastWindow(seconds=seconds, arrivals_rps=rates) for seconds, rates in windows
        )
        for model_id, windows in past.items()
    }


def _problem(
    site: Site, config: SchedulerConfig, demand: Sequence[Demand], horizon_s: float
) -> Problem:
    mesh = site.mesh
    targets = config.targets or {}
    return Problem(
        now_s=0.0,
        epoch=0,
        models=tuple(_model_demand(model_id, demand, horizon_s) for model_id in mesh.model_ids),
        offers=site.offers,
        in_force=DeploymentPlan(plan_id=""),
        kinds={offer.gpu_id: offer.kind for offer in site.offers},
        profiles={model.model_id: model.profile_name for model in mesh.models},
        targets={m.model_id: targets.get(m.model_id, config.target) for m in mesh.models},
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


def _model_demand(model_id: str, demand: Sequence[Demand], horizon_s: float) -> ModelDemand:
    types = tuple(
        TypeForecast(
            request_type=number,
            arrivals_rps=kind.rps,
            input_tokens_mean=kind.input_tokens,
            output_tokens_mean=kind.output_tokens,
            method="history",
        )
        for number, kind in enumerate(kind for kind in demand if kind.model_id == model_id)
    )
    return ModelDemand(model_id=model_id, types=types, horizon_s=horizon_s)
