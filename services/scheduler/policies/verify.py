"""Whether a plan may be asked for at all: checked before each proposal, whoever made the plan."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import isfinite

from services.scheduler.policies.interface import GpuOffer
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

SUM_ERROR_MAX = 1e-9  # of a row of weights: rounding


def verify(
    plan: DeploymentPlan,
    offers: Iterable[GpuOffer],
    models: Collection[str],
    *,
    across_nodes: Collection[str] = (),
) -> list[str]:
    """What is wrong with ``plan``; empty when nothing is. The tensor-parallel groups of the
    replicas ``across_nodes`` may span nodes: their operator asked for it."""
    offered = {offer.gpu_id: offer for offer in offers}
    wrong = [] if plan.replicas else ["it has no replica"]
    ids = Counter(spec.replica_id for spec in plan.replicas)
    wrong += [f"{id_} is named {count} times" for id_, count in sorted(ids.items()) if count > 1]
    owned = Counter(gpu for spec in plan.replicas for gpu in spec.gpus)
    wrong += [f"{gpu} has {count} owners" for gpu, count in sorted(owned.items()) if count > 1]
    for spec in plan.replicas:
        wrong += _wrong_replica(spec, offered, models, across=spec.replica_id in across_nodes)
    for name, row in plan.weights.items():
        unknown = sorted(row.keys() - ids.keys())
        if unknown:
            wrong.append(f"weights of type {name} name unknown replicas {', '.join(unknown)}")
        if not all(isfinite(share) and share >= 0.0 for share in row.values()):
            wrong.append(f"weights of type {name} are not all finite and 0 or more")
        elif abs(sum(row.values()) - 1.0) > SUM_ERROR_MAX:
            wrong.append(f"weights of type {name} sum to {sum(row.values()):g}, not to 1")
    return wrong


def shortages(
    plan: DeploymentPlan,
    offers: Iterable[GpuOffer],
    in_force: DeploymentPlan,
    *,
    replicas_min: Mapping[str, int],
) -> tuple[list[str], list[str]]:
    """Models with fewer replicas than ``replicas_min`` asks for. First those for which that is
    wrong: the plan takes replicas of the model away although GPUs are free that would do. Then
    those for which it is worth a note. A GPU would do if enough of its kind, on its node, are free
    for a replica as the model has one already."""
    taken = {gpu for spec in plan.replicas for gpu in spec.gpus}
    kinds = {offer.gpu_id: offer.kind for offer in offers}
    free = [offer for offer in offers if offer.gpu_id not in taken]
    before = Counter(spec.model_id for spec in in_force.replicas)
    wrong: list[str] = []
    missing: list[str] = []
    for model_id, least in sorted(replicas_min.items()):
        own = [spec for spec in plan.replicas if spec.model_id == model_id]
        if len(own) >= least:
            continue
        known = [*own, *(spec for spec in in_force.replicas if spec.model_id == model_id)]
        room = Counter((o.kind, o.node_id) for o in free if o.serves(model_id))
        fits = any(
            count >= len(spec.gpus) and kind == kinds.get(spec.gpus[0])
            for spec in known
            for (kind, _), count in room.items()
        )
        what = f"{model_id} has {len(own)} of at least {least} replicas"
        if fits and len(own) < before[model_id]:
            wrong.append(f"{what}, and GPUs are free for another")
        else:
            missing.append(what)
    return wrong, missing


def _wrong_replica(
    spec: ReplicaSpec, offered: dict[str, GpuOffer], models: Collection[str], *, across: bool
) -> list[str]:
    if spec.model_id not in models:
        return [f"{spec.replica_id} is of unknown model {spec.model_id}"]
    try:
        shape = Parallelism.parse(spec.parallelism)
    except ConfigInvalid as error:
        return [f"{spec.replica_id}: {error}"]
    if len(spec.gpus) != shape.gpus:
        return [f"{spec.replica_id} has {len(spec.gpus)} GPUs, {shape} needs {shape.gpus}"]
    absent = [gpu for gpu in spec.gpus if gpu not in offered]
    if absent:
        return [f"{spec.replica_id} wants {', '.join(absent)}, not on offer"]
    gpus = [offered[gpu] for gpu in spec.gpus]
    wrong = [
        f"{offer.gpu_id} of {spec.replica_id} cannot serve {spec.model_id}"
        for offer in gpus
        if not offer.serves(spec.model_id)
    ]
    for start in range(0, len(gpus), shape.tp):
        nodes = sorted({offer.node_id for offer in gpus[start : start + shape.tp]})
        if len(nodes) > 1 and not across:
            wrong.append(f"a tensor-parallel group of {spec.replica_id} spans {', '.join(nodes)}")
    return wrong
