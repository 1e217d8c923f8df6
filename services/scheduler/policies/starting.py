"""What serves until anything is expected that could be planned for, so that the mesh serves at
once.

The topology's replicas if it names any; else the default that people deploy: the smallest shape
that leaves 30 % of its GPUs' memory to the KV cache, on all GPUs, split evenly among models. A plan
of other shapes that is in force already (the scheduler was restarted, or demand ceased) is kept.
"""

from collections import Counter
from collections.abc import Mapping

from services.scheduler.policies.costs import kv_share, shapes
from services.scheduler.policies.filling import Pool, Room, fill
from services.scheduler.policies.interface import GpuOffer, Planned, Problem
from services.scheduler.policies.placing import (
    Placement,
    brief,
    place,
    shape_of,
    standing_shapes,
)
from services.scheduler.policies.repair import repair
from services.scheduler.policies.weights import equal, planned
from services.scheduler.static_policy import Static
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan

KV_SHARE_MIN = 0.3


class Starting:
    """Quick: at most a dozen shapes per kind of GPU and model, each worked out once."""

    period_s = 0.0
    slow = False

    def plan(self, problem: Problem) -> Planned:
        start = Static().plan(problem) if problem.wishes else plan_default(problem)
        shapes_now = standing_shapes(problem.in_force)
        shapes_then = Counter(map(shape_of, start.plan.replicas if start.plan else ()))
        if not shapes_now or shapes_now <= shapes_then:
            return start
        return repair(problem, why="nothing is planned for yet")


def plan_default(problem: Problem) -> Planned:
    """The default deployment, with equal weights."""
    chosen = {demand.model_id: default_shape(problem, demand.model_id) for demand in problem.models}
    unknown = [model_id for model_id, found in chosen.items() if found is None]
    known = {model_id: found for model_id, found in chosen.items() if found is not None}

    def need(model_id: str, counts: Mapping[Pool, int]) -> float:
        """One over the GPUs the model has: everyone gets as many."""
        count = sum(n for (_, of), n in counts.items() if of == model_id)
        return 1.0 / (1 + count * known[model_id][1].gpus)

    counts = fill(
        Room(problem.offers),
        shapes={model_id: shape for model_id, (_, shape) in known.items()},
        kinds={model_id: (kind,) for model_id, (kind, _) in known.items()},
        need=need,
    )
    placement = place_by_kind(
        counts, {model_id: shape for model_id, (_, shape) in known.items()}, problem
    )
    words = [
        f"{count} x {model_id} {brief(known[model_id][1])} on {kind}"
        for (kind, model_id), count in sorted(counts.items())
    ]
    words += [
        f"{model_id} fits no GPU on offer, or has no cost profile for it: name replicas in "
        "[[mesh.replicas]]"
        for model_id in unknown
    ]
    reason = "; ".join(["default", *words, *filter(None, [placement.reason])])
    return planned(placement.replicas, equal(placement.replicas), reason=reason)


def default_shape(problem: Problem, model_id: str) -> tuple[str, Parallelism] | None:
    """Kind of GPU and smallest shape with ``KV_SHARE_MIN`` for KV cache, else the roomiest; of the
    kind with most GPUs that has one. None when nothing fits."""
    gpus = Counter(offer.kind for offer in problem.offers if offer.serves(model_id))
    for kind, _ in sorted(gpus.items(), key=lambda item: (-item[1], item[0])):
        found = shapes(kind, problem.profiles[model_id], problem.offers)
        if found:
            roomy = [s for s, model in found.items() if kv_share(model) >= KV_SHARE_MIN]
            return kind, roomy[0] if roomy else max(found, key=lambda s: kv_share(found[s]))
    return None


def place_by_kind(
    counts: Mapping[Pool, int], shapes: Mapping[str, Parallelism], problem: Problem
) -> Placement:
    """``place`` for each kind of GPU in turn."""
    merged = Placement(replicas=())
    for kind in sorted({kind for kind, _ in counts}):
        offers: list[GpuOffer] = [offer for offer in problem.offers if offer.kind == kind]
        placed = place(
            {(id_, shapes[id_]): n for (of, id_), n in counts.items() if of == kind},
            offers,
            problem.in_force,
            taken={spec.replica_id for spec in merged.replicas},
        )
        merged = Placement(
            replicas=(*merged.replicas, *placed.replicas),
            dropped=(*merged.dropped, *placed.dropped),
            reason="; ".join(filter(None, (merged.reason, placed.reason))),
        )
    return merged


def changes(before: DeploymentPlan, after: Placement) -> str:
    """How many replicas come and go, in words."""
    old = {spec.replica_id for spec in before.replicas}
    new = {spec.replica_id for spec in after.replicas}
    return f"replicas to start: {len(new - old)}, to stop: {len(old - new)}"
