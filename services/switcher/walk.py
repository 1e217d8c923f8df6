"""Which commands bring the workers one step nearer to a plan: pure functions of plan and view.

Each function answers the same question every time it is asked, whatever was sent before, so a
lost command is found again and a switcher started anew needs no history. An empty answer means
that the phase is done.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.switcher import copying, live, reload
from services.switcher.commands import Command, part_of
from services.switcher.differences import (
    Wanted,
    in_halves,
    parts,
    strangers,
    wanted_by_worker,
)
from services.switcher.events import TransferWanted
from services.switcher.live import Live
from services.switcher.machine import State, Switch
from services.switcher.staging import stage_moves
from services.switcher.view import WorkerView
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec, StoredPlan
from shared.messages.replicas import (
    GrowCache,
    HostedReplica,
    ResumeReplica,
    StartReplica,
    StopReplica,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What a phase still has to command; when that is nothing, the phase ``after`` it. With
    ``failure`` the switch cannot succeed any more; with ``plan`` its copies have to be planned.
    None of them: wait, for what ``waits`` says or for the commands to be obeyed."""

    commands: list[Command]
    after: State | None = None
    failure: str = ""
    plan: TransferWanted | None = None
    waits: str = ""


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


def next_step(state: State, now: Live, *, drain_timeout_s: float) -> Next:
    """What the walk does in ``state`` of the switch."""
    switch, view, now_s = now.switch, now.view, now.now_s
    match state:
        case "preparing" | "pausing" | "taking":
            failure = live.broken(now)
            step = Next(commands=[], failure=failure) if failure else _live_step(state, now)
        case "activating":
            step = _then("retiring", live.activations(now))
        case "retiring":
            step = _then("settled", reload.stops(switch, view, now_s))
        case "draining":
            step = _then("stopping", reload.drains(switch, view, now_s, timeout_s=drain_timeout_s))
        case "stopping":
            step = _then("starting", reload.stops(switch, view, now_s))
        case "starting":
            commands, failure = reload.starts(switch, view, now_s)
            step = Next(commands=[], failure=failure) if failure else _then("committing", commands)
        case _:  # rolling back
            commands, done = restored(switch, view, now_s, epoch=switch.epoch)
            step = Next(commands=commands, after="committing" if done else None)
    return step


def _live_step(state: State, now: Live) -> Next:
    """Up to the commit."""
    if state == "pausing":
        return _then("taking", live.pauses(now))
    if state == "taking":
        return _then("committing", stage_moves(now) or live.takes(now))
    planned = now.course.planned
    if now.targets and planned is None:
        failure = live.too_late(now)
        wanted = "its plan of copies" if now.course.asked else copying.wanted(now)
        if isinstance(wanted, str):
            return Next(commands=[], waits=wanted, failure=failure)
        return Next(commands=[], plan=wanted, failure=failure)
    failure = f"no plan of copies: {planned.failure}" if planned and planned.failure else ""
    if failure := failure or live.too_late(now):
        return Next(commands=[], failure=failure)
    return _then("pausing", live.in_the_way(now) or live.prepares(now))


def _then(after: State, commands: list[Command]) -> Next:
    return Next(commands=commands, after=None if commands else after)


def repairs(
    plan: DeploymentPlan, view: WorkerView, now_s: float, *, epoch: int, fence: bool = False
) -> list[Command]:
    """What differs between ``plan`` and what live workers hold. A broken replica is stopped
    first, all of it, and started when it is gone. With ``fence`` each replica is started again
    under ``epoch`` even if it serves, which it answers at once, so that it refuses older commands.
    """
    wanted = wanted_by_worker(plan)
    out = sorted({*strangers(wanted, view, now_s), *in_halves(plan.replicas, view, now_s)})
    pending: list[Command] = [
        StopReplica(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in out
    ]
    busy, ending = {worker_id for worker_id, _ in out}, {replica_id for _, replica_id in out}
    for worker_id, want in sorted(wanted.items()):
        spec = want.spec
        part = (worker_id, spec.replica_id)
        if part in out or not view.reported(worker_id) or view.gone(worker_id, now_s):
            continue
        if view.leaving(worker_id):
            continue
        held = view.held(part)
        if held is not None and held.phase in {"draining", "paused"}:
            pending.append(
                ResumeReplica(epoch=epoch, worker_id=worker_id, replica_id=held.replica_id)
            )
            continue
        if held is None:
            late = worker_id in busy or spec.replica_id in ending
            wrong = not late and _can_gather(spec, view, now_s)
        else:
            wrong = _waits(held) or (fence and held.epoch < epoch)
        if wrong:
            pending.append(
                StartReplica(
                    epoch=epoch, worker_id=worker_id, replica=spec, peers=view.peers(spec.gpus)
                )
            )
    return pending


def _waits(held: HostedReplica) -> bool:
    """Whether it only waits to be told to serve, or to go on with requests that it took."""
    return held.phase == "prepared" or held.taken > 0


def _can_gather(spec: ReplicaSpec, view: WorkerView, now_s: float) -> bool:
    """Whether none of the ranks is known to be away: the others would wait for it."""
    return not any(view.gone(gpu, now_s) or view.leaving(gpu) for gpu in spec.gpus)


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
    return [
        *repairs(plan, view, now_s, epoch=epoch),
        *hung,
        *_grows(plan, view, now_s, epoch=epoch),
    ]


def _grows(
    plan: DeploymentPlan, view: WorkerView, now_s: float, *, epoch: int
) -> Iterable[Command]:
    """Replicas whose KV cache was to fit beside those that have left by now: all ranks serve,
    nothing else is on their GPUs, and some have less than they could."""
    for spec in plan.replicas:
        hosted = [view.hosted(gpu) for gpu in spec.gpus if not view.gone(gpu, now_s)]
        ranks = [held for here in hosted if (held := here.get(spec.replica_id)) is not None]
        whole = len(ranks) == len(spec.gpus) and all(held.phase == "serving" for held in ranks)
        alone = all(len(here) == 1 for here in hosted)
        small = any(held.cache_bytes < held.cache_bytes_full for held in ranks)
        if whole and alone and small:
            yield GrowCache(epoch=epoch, worker_id=spec.gpus[0], replica_id=spec.replica_id)


def restored(
    switch: Switch, view: WorkerView, now_s: float, *, epoch: int
) -> tuple[list[Command], bool]:
    """What a rollback still has to command, and whether it is done: every live worker holds
    what the plan says under the new epoch, and none holds a part of the failed target. A replica
    of which a rank is away, or that its worker refuses, can only be planned anew."""
    pending = [
        command
        for command in repairs(switch.target, view, now_s, epoch=epoch, fence=True)
        if not view.refused(part_of(command), epoch=epoch)
    ]
    mine = {part_of(command) for command in pending}
    wanted: dict[str, Wanted] = wanted_by_worker(switch.target)
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
        for worker_id, want in sorted(wanted.items())
        if _can_gather(want.spec, view, now_s)
        and (
            (held := view.held(part := (worker_id, want.spec.replica_id))) is None
            or held.phase != "serving"
        )
        and not view.refused(part, epoch=epoch)
    ]
    return pending, not pending and not waiting
