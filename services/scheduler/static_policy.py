"""Policy ``static``: the topology's replicas with equal weights, wherever they can live.

Replicas whose GPUs are all alive stay where they are, since moving one costs its in-flight
requests. Any other goes to the GPUs the topology names for it if those are free, else to free
GPUs of the kind it had: on the one node that it fills best, else across nodes. What does not fit
is left out of the plan, and the reason says so. Same input, same plan.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.scheduler.plan_id import make_plan
from shared.hardware import Parallelism
from shared.mesh import ReplicaWish
from shared.messages.plans import DeploymentPlan, ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOffer:
    """One GPU that may be planned onto."""

    gpu_id: str
    node_id: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan, or None when nothing can be placed; and why it is what it is."""

    plan: DeploymentPlan | None
    reason: str
    dropped: tuple[str, ...] = ()


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
    free = {offer.gpu_id: offer for offer in sorted(offers, key=lambda offer: offer.gpu_id)}
    standing = {spec.replica_id: spec for spec in in_force.replicas}
    ordered = sorted(wishes, key=lambda wish: wish.replica_id)
    placed: dict[str, ReplicaSpec] = {}

    def place(wish: ReplicaWish, gpus: tuple[str, ...]) -> None:
        for gpu in gpus:
            del free[gpu]
        shape = str(Parallelism.parse(wish.parallelism))
        placed[wish.replica_id] = ReplicaSpec(
            replica_id=wish.replica_id, model_id=model_id, parallelism=shape, gpus=gpus
        )

    for wish in ordered:
        spec = standing.get(wish.replica_id)
        if spec and _stands(spec, wish, model_id) and all(gpu in free for gpu in spec.gpus):
            place(wish, spec.gpus)
    for wish in ordered:
        pinned = wish.replica_id not in placed and wish.gpus
        if pinned and all(gpu in free for gpu in wish.gpus):
            place(wish, wish.gpus)
    notes: list[str] = []
    dropped: list[str] = []
    for wish in ordered:
        if wish.replica_id in placed:
            continue
        spec = standing.get(wish.replica_id)
        kind = _kind_of(wish.gpus or (spec.gpus if spec else ()), kinds)
        size = Parallelism.parse(wish.parallelism).gpus
        gpus = choose_gpus(size, kind, free.values())
        if gpus:
            place(wish, gpus)
        else:
            dropped.append(wish.replica_id)
            free_now = sum(1 for offer in free.values() if not kind or offer.kind == kind)
            notes.append(
                f"{wish.replica_id} left out: needs {size} {kind or 'equal'} GPUs, {free_now} free"
            )
    for wish in ordered:
        spec, now = standing.get(wish.replica_id), placed.get(wish.replica_id)
        if now and spec and spec.gpus != now.gpus:
            notes.append(f"{wish.replica_id} moves from {_names(spec.gpus)} to {_names(now.gpus)}")
    reason = "; ".join([f"static: {len(placed)} of {len(ordered)} replicas placed", *notes])
    if not placed:
        return Planned(plan=None, reason=reason, dropped=tuple(dropped))
    row = {replica_id: 1.0 / len(placed) for replica_id in sorted(placed)}
    plan = make_plan(placed.values(), {"*": row}, reason=reason)
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


def _stands(spec: ReplicaSpec, wish: ReplicaWish, model_id: str) -> bool:
    """Whether the replica in force is still the one that is wished for."""
    same_shape = Parallelism.parse(spec.parallelism) == Parallelism.parse(wish.parallelism)
    return same_shape and spec.model_id == model_id


def _kind_of(gpus: tuple[str, ...], kinds: Mapping[str, str]) -> str:
    return kinds.get(gpus[0], "") if gpus else ""


def _names(gpus: tuple[str, ...]) -> str:
    return "+".join(gpus)
