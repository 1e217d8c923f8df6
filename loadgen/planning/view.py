"""What ``oserve plan --json`` prints. A figure that was not worked out is null, or absent inside a
replica, type or plan."""

import msgspec

from loadgen.planning.advice import Brought
from loadgen.planning.answer import Answer, Change, Rate
from loadgen.planning.report import Report
from shared.messages.decisions import PlanOutlook, ReplicaOutlook, SwitchOutlook, TypeOutlook
from shared.messages.plans import ReplicaSpec
from shared.slo import SloTarget


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """One plan. ``weights[type][replica_id]``: shares, summing to 1 over all models;
    ``type_names``: what a type is called, by model and number; ``outlooks``: of replicas."""

    topology: str
    gpus: str
    demand_source: str
    horizon_s: float
    notes: tuple[str, ...]
    targets: dict[str, SloTarget]
    feasible: bool
    missing: tuple[str, ...]
    plan_id: str | None
    change: Change
    reason: str
    replicas: tuple[ReplicaSpec, ...]
    weights: dict[str, dict[str, float]]
    goal: str
    objective: float | None
    bound: float | None
    gap: float | None
    optimal: bool
    solve_s: float
    price_per_hour: float
    demand: tuple[TypeOutlook, ...]
    type_names: dict[str, dict[str, str]]
    outlooks: tuple[ReplicaOutlook, ...]
    chosen: PlanOutlook | None
    in_force: PlanOutlook | None
    alternatives: tuple[PlanOutlook, ...]
    switch: SwitchOutlook | None
    bottleneck: str
    advice: tuple[str, ...]


class WhatIfView(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that ``what_if`` leads to."""

    what_if: str
    plan: PlanView


class ReportView(PlanView, frozen=True, kw_only=True):
    """The plan, and what was asked beside it. ``rates``: n[shape, type], what one replica of a
    shape serves of one type alone; ``fresh``: the plan as if nothing were in force, what the
    others are to be compared with; ``brought``: by more hardware."""

    rates: tuple[Rate, ...]
    fresh: PlanView | None
    what_ifs: tuple[WhatIfView, ...]
    brought: tuple[Brought, ...]
    starts: tuple[str, ...]


def view(report: Report) -> ReportView:
    """All that was found."""
    return ReportView(
        **msgspec.structs.asdict(plan_view(report.answer)),
        rates=report.rates,
        fresh=None if report.fresh is None else plan_view(report.fresh),
        what_ifs=tuple(
            WhatIfView(what_if=changed.what_if, plan=plan_view(changed.answer))
            for changed in report.what_ifs
        ),
        brought=report.brought,
        starts=report.starts,
    )


def plan_view(answer: Answer) -> PlanView:
    """One answer."""
    decision, plan = answer.decision, answer.plan
    names: dict[str, dict[str, str]] = {}
    for kind in answer.types:
        names.setdefault(kind.model_id, {})[kind.request_type] = kind.name
    return PlanView(
        topology=answer.topology,
        gpus=answer.gpus,
        demand_source=answer.demand,
        horizon_s=answer.horizon_s,
        notes=answer.notes,
        targets=answer.targets,
        feasible=answer.feasible,
        missing=answer.missing,
        plan_id=None if plan is None else plan.plan_id,
        change=answer.change,
        reason=answer.reason,
        replicas=() if plan is None else plan.replicas,
        weights={} if plan is None else plan.weights,
        goal=decision.goal,
        objective=decision.objective,
        bound=decision.bound,
        gap=decision.gap,
        optimal=decision.optimal,
        solve_s=decision.solve_s or answer.took_s,
        price_per_hour=answer.price_per_hour,
        demand=decision.types,
        type_names=names,
        outlooks=decision.replicas,
        chosen=decision.chosen,
        in_force=decision.in_force,
        alternatives=decision.alternatives,
        switch=decision.switch,
        bottleneck=decision.bottleneck,
        advice=decision.advice,
    )
