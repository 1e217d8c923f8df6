"""The plan in force on the GPUs that are left: what a mesh does until its policy has an answer.

``survivors`` takes no worker's time, so that it comes first when the policy is to answer next;
``repair`` starts what was lost anew, so that it may stand.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.placing import Shape, place, shape_of, standing_shapes
from services.scheduler.policies.weights import ANY_TYPE, joined, planned
from shared.messages.plans import DeploymentPlan, ReplicaSpec


def repair(problem: Problem, *, why: str) -> Planned:
    """The plan in force itself if all its GPUs are on offer. Else its replicas placed anew where
    their GPUs are gone, with the shares they had; what finds no room leaves its share to the
    others."""
    in_force = problem.in_force
    offered = {offer.gpu_id for offer in problem.offers}
    if all(gpu in offered for spec in in_force.replicas for gpu in spec.gpus):
        plan = in_force if in_force.replicas else None
        return Planned(plan=plan, reason=f"{why}: the plan in force is kept")
    placement = place(standing_shapes(in_force), problem.offers, in_force)
    replicas = placement.replicas
    heirs = _heirs(in_force, replicas)
    reason = f"{why}: {len(replicas)} of {len(in_force.replicas)} replicas of the last plan placed"
    return planned(
        replicas,
        joined(_inherited(in_force, replicas, heirs)),
        reason="; ".join(filter(None, (reason, placement.reason))),
        dropped=tuple(f"{model_id} {shape}" for model_id, shape in placement.dropped),
    )


def lost(plan: DeploymentPlan, problem: Problem) -> tuple[str, ...]:
    """Replicas of ``plan`` that miss a GPU among those on offer."""
    offered = {offer.gpu_id for offer in problem.offers}
    return tuple(spec.replica_id for spec in plan.replicas if not offered.issuperset(spec.gpus))


def survivors(problem: Problem, *, why: str) -> Planned:
    """The plan in force without its ``lost`` replicas, whose shares go to the others of their
    model; None if there are no others."""
    in_force = problem.in_force
    gone = lost(in_force, problem)
    replicas = tuple(spec for spec in in_force.replicas if spec.replica_id not in gone)
    rows = joined(_inherited(in_force, replicas, {})) if replicas else {}
    reason = f"{why}: {', '.join(gone)} left out, {len(replicas)} replicas go on"
    return planned(replicas, rows, reason=reason, dropped=gone)


def _heirs(before: DeploymentPlan, after: tuple[ReplicaSpec, ...]) -> dict[str, str]:
    """The new replica for each one that could not stay: the next of its shape."""
    standing = {spec.replica_id for spec in before.replicas}
    new: dict[Shape, list[str]] = defaultdict(list)
    for spec in after:
        if spec.replica_id not in standing:
            new[shape_of(spec)].append(spec.replica_id)
    stayed = {spec.replica_id for spec in after}
    heirs: dict[str, str] = {}
    for spec in before.replicas:
        if spec.replica_id not in stayed and new[shape_of(spec)]:
            heirs[spec.replica_id] = new[shape_of(spec)].pop(0)
    return heirs


def _inherited(
    before: DeploymentPlan, after: tuple[ReplicaSpec, ...], heirs: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Rows by model, as ``joined`` wants them; equal shares where a model's row has none left."""
    model_of = {spec.replica_id: spec.model_id for spec in after}
    counts = Counter(model_of.values())
    rows: dict[str, dict[str, dict[str, float]]] = {
        model_id: {ANY_TYPE: {id_: 1.0 for id_, of in model_of.items() if of == model_id}}
        for model_id in counts
    }
    for name, row in before.weights.items():
        shares: dict[str, dict[str, float]] = defaultdict(dict)
        for old_id, share in row.items():
            replica_id = heirs.get(old_id, old_id)
            if replica_id in model_of and share > 0.0:
                shares[model_of[replica_id]][replica_id] = share
        for model_id, own in shares.items():
            rows[model_id][name] = own
    return rows
