"""The way "reload": drain and stop what goes, then load what comes from disk. Pure."""

from services.switcher.commands import Command
from services.switcher.differences import (
    arriving,
    in_halves,
    leaving,
    parts,
    strangers,
    wanted_by_worker,
)
from services.switcher.machine import Switch
from services.switcher.view import WorkerView
from shared.messages.replicas import DrainReplica, StartReplica, StopReplica


def drains(switch: Switch, view: WorkerView, now_s: float, *, timeout_s: float) -> list[Command]:
    """Leaders that still have to drain. One that is gone, broke, or holds the replica no more
    has nothing left to finish."""
    pending: list[Command] = []
    for spec in leaving(switch.origin, switch.target):
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


def stops(switch: Switch, view: WorkerView, now_s: float) -> list[Command]:
    """Ranks that still have to let go. Only their word counts, since a report may be older than
    the start of what it does not show; a worker that is gone holds nothing."""
    going = set(parts(leaving(switch.origin, switch.target)))
    going.update(strangers(wanted_by_worker(switch.target), view, now_s))
    return [
        StopReplica(epoch=switch.epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in sorted(going)
        if not view.gone(worker_id, now_s)
        and not view.stopped((worker_id, replica_id), epoch=switch.epoch)
    ]


def starts(switch: Switch, view: WorkerView, now_s: float) -> tuple[list[Command], str]:
    """Ranks that still have to start, or why the switch cannot succeed any more."""
    coming = arriving(switch.origin, switch.target)
    halves = in_halves(coming, view, now_s)
    pending: list[Command] = []
    for spec in coming:
        for worker_id in spec.gpus:
            part = (worker_id, spec.replica_id)
            held = view.held(part)
            if view.gone(worker_id, now_s) or view.leaving(worker_id):
                return [], f"worker {worker_id} of {spec.replica_id} is gone"
            if refusal := view.refused(part, epoch=switch.epoch):
                return [], f"{spec.replica_id} failed on {worker_id}: {refusal}"
            current = held is not None and held.epoch >= switch.epoch
            if held is not None and current and held.phase == "failed":
                return [], f"{spec.replica_id} failed on {worker_id}: {held.detail}"
            if held is not None and current and held.phase == "serving" and part not in halves:
                continue
            others = [r for r in view.hosted(worker_id) if r != spec.replica_id]
            if part in halves:
                others.append(spec.replica_id)
            if others:
                pending += [
                    StopReplica(epoch=switch.epoch, worker_id=worker_id, replica_id=other)
                    for other in sorted(others)
                ]
            elif all(replica_id != spec.replica_id for _, replica_id in halves):
                pending.append(
                    StartReplica(
                        epoch=switch.epoch,
                        worker_id=worker_id,
                        replica=spec,
                        peers=view.peers(spec.gpus),
                    )
                )
    return pending, ""
