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


class _Board:
    """GPUs still free and replicas already placed, while a plan is made."""

    def __init__(self, offers: Iterable[GpuOffer], model_id: str) -> None:
        self.free = {offer.gpu_id: offer for offer in sorted(offers, key=lambda o: o.gpu_id)}
        self.placed: dict[str, ReplicaSpec] = {}
        self._model_id = model_id

    def place(self, wish: ReplicaWish, gpus: tuple[str, ...]) -> bool:
        """Give the GPUs to the replica, if there are some and all are free."""
        if not gpus or not all(gpu in self.free for gpu in gpus):
            return False
        for gpu in gpus:
            del self.free[gpu]
        self.placed[wish.replica_id] = ReplicaSpec(
            replica_id=wish.replica_id,
            model_id=self._model_id,
            parallelism=str(Parallelism.parse(wish.parallelism)),
            gpus=gpus,
        )
        return True


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
    board = _Board(offers, model_id)
    standing = {spec.replica_id: spec for spec in in_force.replicas}
    ordered = sorted(wishes, key=lambda wish: wish.replica_id)
    homeless: list[ReplicaWish] = []
    for wish in ordered:
        spec = standing.get(wish.replica_id)
        if not (spec and _stands(spec, wish, model_id) and board.place(wish, spec.gpus)):
            homeless.append(wish)
    homeless = [wish for wish in homeless if not board.place(wish, wish.gpus)]
    notes: list[str] = []
    dropped: list[str] = []
    for wish in homeless:
        spec = standing.get(wish.replica_id)
        kind = _kind_of(wish.gpus or (spec.gpus if spec else ()), kinds)
        size = Parallelism.parse(wish.parallelism).gpus
        if not board.place(wish, choose_gpus(size, kind, board.free.values())):
            dropped.append(wish.replica_id)
            free = sum(1 for offer in board.free.values() if kind in ("", offer.kind))
            needs = f"{size} {kind or 'like'} GPU{'s' if size > 1 else ''}"
            notes.append(f"{wish.replica_id} left out: needs {needs}, {free} free")
    notes += _moves(standing, board.placed)
    reason = "; ".join([f"static: {len(board.placed)} of {len(ordered)} replicas placed", *notes])
    if not board.placed:
        return Planned(plan=None, reason=reason, dropped=tuple(dropped))
    row = dict.fromkeys(sorted(board.placed), 1.0 / len(board.placed))
    plan = make_plan(board.placed.values(), {"*": row}, reason=reason)
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
