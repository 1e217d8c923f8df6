"""What differs between two plans, and between a plan and what a worker holds. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.switcher.view import Part, WorkerView
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import HostedReplica


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a worker should hold: this replica, as this rank."""

    spec: ReplicaSpec
    rank: int

    def matches(self, held: HostedReplica) -> bool:
        return (
            held.replica_id == self.spec.replica_id
            and held.rank == self.rank
            and held.model_id in ("", self.spec.model_id)
            and Parallelism.parse(held.parallelism) == Parallelism.parse(self.spec.parallelism)
        )


def leaving(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
    """Replicas of ``origin`` that ``target`` lacks or has otherwise."""
    kept = set(target.replicas)
    return tuple(spec for spec in origin.replicas if spec not in kept)


def arriving(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
    return leaving(target, origin)


def staying(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
    kept = set(target.replicas)
    return tuple(spec for spec in origin.replicas if spec in kept)


def parts(specs: Iterable[ReplicaSpec]) -> list[Part]:
    return sorted((gpu, spec.replica_id) for spec in specs for gpu in spec.gpus)


def wanted_by_worker(plan: DeploymentPlan) -> dict[str, Wanted]:
    return {gpu: Wanted(spec, rank) for spec in plan.replicas for rank, gpu in enumerate(spec.gpus)}


def strangers(wanted: dict[str, Wanted], view: WorkerView, now_s: float) -> list[Part]:
    """Parts that live workers hold and should not, or hold broken."""
    found: list[Part] = []
    for worker_id in view.known():
        if view.gone(worker_id, now_s):
            continue
        want = wanted.get(worker_id)
        for replica_id, held in sorted(view.hosted(worker_id).items()):
            if want is None or not want.matches(held) or held.phase == "failed":
                found.append((worker_id, replica_id))
    return found


def in_halves(specs: Iterable[ReplicaSpec], view: WorkerView, now_s: float) -> list[Part]:
    """Parts that are of no use any more: another rank of the replica broke, or was lost since (the
    ranks of a replica find each other only once), or some of their weights have been given up."""
    found: list[Part] = []
    for spec in specs:
        alive = [(w, spec.replica_id) for w in spec.gpus if not view.gone(w, now_s)]
        held = {part: h for part in alive if (h := view.held(part)) is not None}
        lost = [part for part in alive if part not in held]
        spoilt = any(
            h.phase == "failed" or (h.phase == "paused" and h.stage > 0) for h in held.values()
        )
        if spoilt or any(view.lost_since(one, other) for one in lost for other in held):
            found += held
    return found
