"""Which commands bring the workers one step nearer to a plan: pure functions of plan and view.

Each function answers the same question every time it is asked, whatever was sent before, so a
lost command is found again and a switcher started anew needs no history. An empty answer means
that the phase is done.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.switcher.machine import State, Switch
from services.switcher.view import Part, WorkerView
from shared import subjects
from shared.core import Publish
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec, StoredPlan
from shared.messages.replicas import (
    DrainReplica,
    HostedReplica,
    ResumeReplica,
    StartReplica,
    StopReplica,
)

Command = StartReplica | DrainReplica | StopReplica | ResumeReplica


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What a phase still has to command; when that is nothing, the phase ``after`` it. With
    ``failure`` the switch cannot succeed any more. Neither: wait."""

    commands: list[Command]
    after: State | None = None
    failure: str = ""


def publish(command: Command) -> Publish:
    match command:
        case StartReplica():
            return subjects.START_REPLICA.send(command, worker_id=command.worker_id)
        case DrainReplica():
            return subjects.DRAIN_REPLICA.send(command, worker_id=command.worker_id)
        case StopReplica():
            return subjects.STOP_REPLICA.send(command, worker_id=command.worker_id)
        case ResumeReplica():
            return subjects.RESUME_REPLICA.send(command, worker_id=command.worker_id)


def part_of(command: Command) -> Part:
    if isinstance(command, StartReplica):
        return (command.worker_id, command.replica.replica_id)
    return (command.worker_id, command.replica_id)


def faults_of(plan: DeploymentPlan) -> str:
    """Why ``plan`` can never be put in force, "" if it can: the last guard before the workers,
    independent of whoever made the plan."""
    owner: dict[str, str] = {}
    ids = [replica.replica_id for replica in plan.replicas]
    if len(set(ids)) != len(ids):
        return f"replica ids repeat: {sorted(ids)}"
    for replica in plan.replicas:
        if len(replica.gpus) != Parallelism.parse(replica.parallelism).gpus:
            return f"{replica.replica_id}: {replica.parallelism} on {len(replica.gpus)} GPUs"
        for gpu in replica.gpus:
            if gpu in owner:
                return f"{gpu} is given to {owner[gpu]} and to {replica.replica_id}"
            owner[gpu] = replica.replica_id
    for request_type, row in sorted(plan.weights.items()):
        if unknown := sorted(set(row) - set(ids)):
            return f"weights of type {request_type} name unknown replicas {unknown}"
    return ""


def leaving(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
    """Replicas of ``origin`` that ``target`` lacks or has otherwise."""
    kept = set(target.replicas)
    return tuple(spec for spec in origin.replicas if spec not in kept)


def arriving(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
    return leaving(target, origin)


def parts(specs: Iterable[ReplicaSpec]) -> list[Part]:
    return sorted((gpu, spec.replica_id) for spec in specs for gpu in spec.gpus)


def wanted_by_worker(plan: DeploymentPlan) -> dict[str, Wanted]:
    return {gpu: Wanted(spec, rank) for spec in plan.replicas for rank, gpu in enumerate(spec.gpus)}


def next_step(
    state: State,
    origin: DeploymentPlan,
    switch: Switch,
    view: WorkerView,
    now_s: float,
    *,
    drain_timeout_s: float,
) -> Next:
    """What the walk does in ``state``, from ``origin`` to the target of ``switch``."""
    match state:
        case "draining":
            commands = drains(origin, switch, view, now_s, timeout_s=drain_timeout_s)
            return Next(commands=commands, after=None if commands else "stopping")
        case "stopping":
            commands = stops(origin, switch, view, now_s)
            return Next(commands=commands, after=None if commands else "starting")
        case "starting":
            commands, failure = starts(origin, switch, view, now_s)
            done = not commands and not failure
            return Next(commands=commands, failure=failure, after="committing" if done else None)
        case "rolling_back":
            commands, done = restored(switch, view, now_s, epoch=switch.epoch)
            return Next(commands=commands, after="committing" if done else None)
        case _:
            return Next(commands=[])


def drains(
    origin: DeploymentPlan, switch: Switch, view: WorkerView, now_s: float, *, timeout_s: float
) -> list[Command]:
    """Leaders that still have to drain. One that is gone, broke, or holds the replica no more
    has nothing left to finish."""
    pending: list[Command] = []
    for spec in leaving(origin, switch.target):
        worker_id = spec.gpus[0]
        part = (worker_id, spec.replica_id)
        held = view.held(part)
        absent = view.reported(worker_id) and (held is None or held.phase == "failed")
        if absent or view.gone(worker_id, now_s) or view.drained(part, epoch=switch.epoch):
            continue
        pending.append(
            DrainReplica(
                epoch=switch.epoch,
                worker_id=worker_id,
                replica_id=spec.replica_id,
                timeout_s=timeout_s,
            )
        )
    return pending


def stops(origin: DeploymentPlan, switch: Switch, view: WorkerView, now_s: float) -> list[Command]:
    """Ranks that still have to let go. Only their word counts, since a report may be older than
    the start of what it does not show; a worker that is gone holds nothing."""
    going = set(parts(leaving(origin, switch.target)))
    going.update(_strangers(wanted_by_worker(switch.target), view, now_s))
    return [
        StopReplica(epoch=switch.epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in sorted(going)
        if not view.gone(worker_id, now_s)
        and not view.stopped((worker_id, replica_id), epoch=switch.epoch)
    ]


def starts(
    origin: DeploymentPlan, switch: Switch, view: WorkerView, now_s: float
) -> tuple[list[Command], str]:
    """Ranks that still have to start, or why the switch cannot succeed any more."""
    pending: list[Command] = []
    for spec in arriving(origin, switch.target):
        for worker_id in spec.gpus:
            part = (worker_id, spec.replica_id)
            held = view.held(part)
            if view.gone(worker_id, now_s) or view.leaving(worker_id):
                return [], f"worker {worker_id} of {spec.replica_id} is gone"
            current = held is not None and held.epoch >= switch.epoch
            if held is not None and current and held.phase == "failed":
                return [], f"{spec.replica_id} failed on {worker_id}: {held.detail}"
            if held is not None and current and held.phase == "serving":
                continue
            others = [r for r in view.hosted(worker_id) if r != spec.replica_id]
            if others:
                pending += [
                    StopReplica(epoch=switch.epoch, worker_id=worker_id, replica_id=other)
                    for other in sorted(others)
                ]
            else:
                pending.append(StartReplica(epoch=switch.epoch, worker_id=worker_id, replica=spec))
    return pending, ""


def repairs(
    plan: DeploymentPlan, view: WorkerView, now_s: float, *, epoch: int, fence: bool = False
) -> list[Command]:
    """What differs between ``plan`` and what live workers hold. A broken replica is stopped
    first and started when it is gone. With ``fence`` each replica is started again under
    ``epoch`` even if it serves, which it answers at once, so that it refuses older commands."""
    wanted = wanted_by_worker(plan)
    pending: list[Command] = [
        StopReplica(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in _strangers(wanted, view, now_s)
    ]
    busy = {command.worker_id for command in pending}
    for worker_id, want in sorted(wanted.items()):
        if worker_id in busy or not view.reported(worker_id) or view.gone(worker_id, now_s):
            continue
        if view.leaving(worker_id):
            continue
        held = view.held((worker_id, want.spec.replica_id))
        if held is not None and held.phase == "draining":
            pending.append(
                ResumeReplica(epoch=epoch, worker_id=worker_id, replica_id=held.replica_id)
            )
        elif held is None or (fence and held.epoch < epoch):
            pending.append(StartReplica(epoch=epoch, worker_id=worker_id, replica=want.spec))
    return pending


def upkeep(
    stored: StoredPlan, view: WorkerView, now_s: float, *, start_timeout_s: float
) -> list[Command]:
    """Repairs while no switch is under way, whose deadline would end a start that hangs: what
    has been starting for too long is stopped here, and so started again."""
    plan, epoch = stored.in_force, stored.epoch
    hung: list[Command] = [
        StopReplica(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in parts(plan.replicas)
        if view.starting_for_s((worker_id, replica_id), now_s) > start_timeout_s
        and not view.gone(worker_id, now_s)
    ]
    return [*repairs(plan, view, now_s, epoch=epoch), *hung]


def restored(
    switch: Switch, view: WorkerView, now_s: float, *, epoch: int
) -> tuple[list[Command], bool]:
    """What a rollback still has to command, and whether it is done: every live worker holds
    what the plan says under the new epoch, and none holds a part of the failed target."""
    pending = repairs(switch.target, view, now_s, epoch=epoch, fence=True)
    mine = {part_of(command) for command in pending}
    wanted = wanted_by_worker(switch.target)
    kept = {(worker_id, want.spec.replica_id) for worker_id, want in wanted.items()}
    if switch.failed is not None:
        pending += [
            StopReplica(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
            for worker_id, replica_id in parts(switch.failed.replicas)
            if (worker_id, replica_id) not in kept | mine
            and not view.gone(worker_id, now_s)
            and not view.stopped((worker_id, replica_id), epoch=epoch)
        ]
    waiting = [
        part
        for part in sorted(kept)
        if not view.gone(part[0], now_s)
        and not view.leaving(part[0])
        and ((held := view.held(part)) is None or held.phase != "serving")
    ]
    return pending, not pending and not waiting


def _strangers(wanted: dict[str, Wanted], view: WorkerView, now_s: float) -> list[Part]:
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
