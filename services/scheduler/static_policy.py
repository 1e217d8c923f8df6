"""Policy ``static``: the topology's replicas with equal weights, wherever they can live.

Replicas whose GPUs are all alive stay where they are, since moving one costs its in-flight
requests. Any other goes to the GPUs the topology names for it if those are free, else to free
GPUs of the kind it had: on the one node that it fills best, else across nodes. What does not fit
is left out of the plan, and the reason says so. A wish that names no model is for the topology's
first. Same input, same plan.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import GpuOffer, Planned, Problem
from services.scheduler.policies.weights import equal
from shared.hardware import Parallelism
from shared.mesh import ReplicaWish
from shared.messages.plans import DeploymentPlan, ReplicaSpec


class _Board:
    """GPUs still free and replicas already placed, while a plan is made."""

    def __init__(self, offers: Iterable[GpuOffer]) -> None:
        self.free = {offer.gpu_id: offer for offer in sorted(offers, key=lambda o: o.gpu_id)}
        self.placed: dict[str, ReplicaSpec] = {}

    def free_for(self, model_id: str) -> list[GpuOffer]:
        return [offer for offer in self.free.values() if offer.serves(model_id)]

    def place(self, wish: ReplicaWish, gpus: tuple[str, ...]) -> bool:
        """Give the GPUs to the replica, if there are some and all are free and serve its model."""
        if not gpus or not all(
            gpu in self.free and self.free[gpu].serves(wish.model_id) for gpu in gpus
        ):
            return False
        for gpu in gpus:
            del self.free[gpu]
        self.placed[wish.replica_id] = ReplicaSpec(
            replica_id=wish.replica_id,
            model_id=wish.model_id,
            parallelism=str(Parallelism.parse(wish.parallelism)),
            gpus=gpus,
        )
        return True


class Static:
    """``plan_static`` as a policy: cheap, so that it decides each period anew."""

    period_s = 0.0
    slow = False

    def plan(self, problem: Problem) -> Planned:
        planned = plan_static(
            problem.wishes,
            problem.models[0].model_id,
            offers=problem.offers,
            kinds=problem.kinds,
            in_force=problem.in_force,
        )
        if planned.plan is not None:
            return planned
        reason = f"nothing can be placed, so nothing moves: {planned.reason}"
        return Planned(plan=None, reason=reason, dropped=planned.dropped)

    start = plan


def plan_static(
    wishes: Iterable[ReplicaWish],
    model_id: str,
    *,
    offers: Iterable[GpuOffer],
    kinds: Mapping[str, str],
    in_force: DeploymentPlan,
) -> Planned:
    """``kinds`` names the kind of every GPU ever known, so that a replica whose GPU vanished is
    placed on its like."""
    board = _Board(offers)
    standing = {spec.replica_id: spec for spec in in_force.replicas}
    ordered = [
        wish if wish.model_id else msgspec.structs.replace(wish, model_id=model_id)
        for wish in sorted(wishes, key=lambda wish: wish.replica_id)
    ]
    homeless: list[ReplicaWish] = []
    for wish in ordered:
        spec = standing.get(wish.replica_id)
        if not (spec and _stands(spec, wish) and board.place(wish, spec.gpus)):
            homeless.append(wish)
    homeless = [wish for wish in homeless if not board.place(wish, wish.gpus)]
    notes: list[str] = []
    dropped: list[str] = []
    for wish in homeless:
        spec = standing.get(wish.replica_id)
        kind = _kind_of(wish.gpus or (spec.gpus if spec else ()), kinds)
        size = Parallelism.parse(wish.parallelism).gpus
        if not board.place(wish, choose_gpus(size, kind, board.free_for(wish.model_id))):
            dropped.append(wish.replica_id)
            free = sum(1 for offer in board.free_for(wish.model_id) if kind in ("", offer.kind))
            needs = f"{size} {kind or 'like'} GPU{'s' if size > 1 else ''}"
            notes.append(f"{wish.replica_id} left out: needs {needs}, {free} free")
    notes += _moves(standing, board.placed)
    reason = "; ".join([f"static: {len(board.placed)} of {len(ordered)} replicas placed", *notes])
    if not board.placed:
        return Planned(plan=None, reason=reason, dropped=tuple(dropped))
    replicas = tuple(board.placed.values())
    plan = make_plan(replicas, equal(replicas), reason=reason)
    return Planned(plan=plan, reason=reason, dropped=tuple(dropped))


def choose_gpus(size: int, kind: str, free: Iterable[GpuOffer]) -> tuple[str, ...]:
    """``size`` GPUs of one kind (of ``kind`` if it is given): on the node where fewest would be
    left over, else spread over nodes; empty when there are too few."""
    by_node: dict[tuple[str, str], list[str]] = defaultdict(list)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for offer in sorted(free, key=lambda offer: (offer.node_id, offer.gpu_id)):
        if kind in ("", offer.kind):
            by_node[offer.kind, offer.node_id].append(offer.gpu_id)
            by_kind[offer.kind].append(offer.gpu_id)
    fits = [(len(gpus), key) for key, gpus in by_node.items() if len(gpus) >= size]
    if fits:
        return tuple(by_node[min(fits)[1]][:size])
    spread = [(len(gpus), key) for key, gpus in by_kind.items() if len(gpus) >= size]
    return tuple(by_kind[min(spread)[1]][:size]) if spread else ()


def _stands(spec: ReplicaSpec, wish: ReplicaWish) -> bool:
    """Whether the replica in force is still the one that is wished for."""
    same_shape = Parallelism.parse(spec.parallelism) == Parallelism.parse(wish.parallelism)
    return same_shape and spec.model_id == wish.model_id


def _moves(before: Mapping[str, ReplicaSpec], after: Mapping[str, ReplicaSpec]) -> list[str]:
    return [
        f"{id_} moves from {_names(before[id_].gpus)} to {_names(spec.gpus)}"
        for id_, spec in sorted(after.items())
        if id_ in before and before[id_].gpus != spec.gpus
    ]


def _kind_of(gpus: tuple[str, ...], kinds: Mapping[str, str]) -> str:
    return kinds.get(gpus[0], "") if gpus else ""


def _names(gpus: tuple[str, ...]) -> str:
    return "+".join(gpus)
