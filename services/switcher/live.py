"""The way "live": what its phases still have to command. Pure.

Like all of the walk, each function answers from what is reported, whatever was sent before. Ranks
that were prepared and are lost cannot be prepared once more, since the ranks of a replica find each
other only once: before the commit that rolls back.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.switcher.commands import Command
from services.switcher.course import Course
from services.switcher.differences import arriving, leaving, parts, strangers, wanted_by_worker
from services.switcher.machine import Switch
from services.switcher.takers import Takeover, takeovers
from services.switcher.view import Part, WorkerView
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    HostedReplica,
    PauseReplica,
    PrepareReplica,
    Shares,
    StartReplica,
    StopReplica,
    TakeRequests,
)

STANDS_OR_RUNS = frozenset({"serving", "draining", "paused"})
NO_SHARES = Shares()


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A live switch, and what is known of it now."""

    switch: Switch
    course: Course
    view: WorkerView
    now_s: float
    verify: bool = False
    cache_tokens_min: int = 1

    @property
    def takeovers(self) -> tuple[Takeover, ...]:
        return takeovers(self.switch.origin, self.switch.target)

    @property
    def arriving(self) -> tuple[ReplicaSpec, ...]:
        return arriving(self.switch.origin, self.switch.target)

    @property
    def targets(self) -> tuple[ReplicaSpec, ...]:
        """Replicas to be made ready: those that come, and those that stay and take requests."""
        takers = (spec for takeover in self.takeovers for spec in takeover.takers)
        return tuple(dict.fromkeys((*self.arriving, *takers)))

    def gone(self, worker_id: str) -> bool:
        return self.view.gone(worker_id, self.now_s)

    def leader(self, spec: ReplicaSpec) -> HostedReplica | None:
        """As its worker holds it; None if that worker is gone."""
        if self.gone(spec.gpus[0]):
            return None
        return self.view.held((spec.gpus[0], spec.replica_id))

    def stands(self, spec: ReplicaSpec) -> bool:
        """Whether it is paused for this switch."""
        held = self.leader(spec)
        return held is not None and held.phase == "paused" and held.epoch >= self.switch.epoch

    def handing_over(self, spec: ReplicaSpec) -> tuple[tuple[ReplicaSpec, ...], Shares]:
        """Whose requests ``spec`` takes, and how they are spread."""
        for takeover in self.takeovers:
            if spec in takeover.takers:
                return takeover.sources, takeover.shares
        return (), NO_SHARES


def broken(live: Live) -> str:
    """Why the switch cannot succeed any more, as far as its new replicas are concerned."""
    epoch, view = live.switch.epoch, live.view
    for spec in live.targets:
        for worker_id in spec.gpus:
            part = (worker_id, spec.replica_id)
            held = view.held(part)
            if live.gone(worker_id) or view.leaving(worker_id):
                return f"worker {worker_id} of {spec.replica_id} is gone"
            if failure := live.course.failure(part):
                return f"{spec.replica_id} failed on {worker_id}: {failure}"
            if held is not None and held.phase == "failed":
                if held.epoch >= epoch or spec not in live.arriving:
                    return f"{spec.replica_id} failed on {worker_id}: {held.detail}"
            elif live.course.lost(part, view):
                return f"{spec.replica_id} was lost on {worker_id}"
    return ""


def ready(live: Live, part: Part) -> bool:
    held = live.view.held(part)
    return held is not None and held.prepared >= live.switch.epoch and held.phase != "preparing"


def unprepared(live: Live) -> list[tuple[ReplicaSpec, str]]:
    """Ranks, with their replica, that are not ready yet."""
    return [
        (spec, worker_id)
        for spec in live.targets
        for worker_id in spec.gpus
        if not ready(live, (worker_id, spec.replica_id))
    ]


def too_late(live: Live) -> str:
    """Why nothing can be prepared any more: requests wait already, for a rank that was prepared
    and is not. Only a switcher started in the middle meets it."""
    waiting = any(live.stands(s) for takeover in live.takeovers for s in takeover.sources)
    for spec, worker_id in unprepared(live) if waiting else ():
        if live.view.reported(worker_id):
            return f"{spec.replica_id} is not ready on {worker_id} and requests wait for it"
    return ""


def in_the_way(live: Live) -> list[Command]:
    """What is in neither plan gives its memory back first, and so does what is left of an earlier
    attempt at the same replica, or goes and was not whole when the copies were planned: its memory
    was not counted on. Of the last even what no worker holds is stopped: a repair may be on its
    way there, and whoever has answered this epoch obeys it no more."""
    switch, mine = live.switch, parts(live.arriving)
    workers = {worker_id for worker_id, _ in mine}
    known = set(parts((*switch.origin.replicas, *switch.target.replicas)))
    found = set(strangers(wanted_by_worker(switch.target), live.view, live.now_s)) - known
    found.update(
        part for part in mine if (held := live.view.held(part)) and held.epoch < switch.epoch
    )
    found = {part for part in found if part[0] in workers}
    asked = live.course.asked
    useless = set(leaving(switch.origin, switch.target)) - set(asked.leaving if asked else ())
    found.update(
        part
        for part in parts(useless)
        if not live.gone(part[0])
        and (live.view.held(part) or not live.view.stopped(part, epoch=switch.epoch))
    )
    return [
        StopReplica(epoch=switch.epoch, worker_id=worker_id, replica_id=replica_id)
        for worker_id, replica_id in sorted(found)
    ]


def prepares(live: Live) -> list[Command]:
    """Ranks that still have to be made ready along the planned copies."""
    planned, switch = live.course.planned, live.switch
    if planned is None:
        return []
    pending: list[Command] = []
    for spec, worker_id in unprepared(live):
        sources, shares = live.handing_over(spec)
        copies = planned.copies.get(worker_id, {}).get(spec.replica_id, ())
        workers = {copy.source for copy in copies} | {gpu for s in sources for gpu in s.gpus}
        pending.append(
            PrepareReplica(
                epoch=switch.epoch,
                worker_id=worker_id,
                replica=spec,
                peers=live.view.peers((*spec.gpus, *workers)),
                copies=copies,
                sources=_leaders(s for s in sources if live.leader(s) is not None),
                shares=shares,
                stages=len(planned.stages),
                stage_layers=planned.stages if len(planned.stages) > 1 else (),
                cache_bytes_max=planned.cache_bytes_max.get(worker_id, 0),
                verify=live.verify,
            )
        )
    return pending


def lets_go(live: Live, spec: ReplicaSpec) -> bool:
    """Whether a replica that goes will not stand still any more, though its leader is there: it
    drains, its worker is shutting down, or it has refused. Its requests end there, or are handed
    back when it is stopped."""
    held, worker_id = live.leader(spec), spec.gpus[0]
    if held is None or live.stands(spec):
        return False
    refused = live.course.failure((worker_id, spec.replica_id))
    return held.phase == "draining" or live.view.leaving(worker_id) or bool(refused)


def pauses(live: Live) -> list[Command]:
    """Leaders that still have to stand still. One that is gone, broke or never served has no
    requests that could be taken: they are replayed. One that lets its requests go is not waited
    for: the others stand still already."""
    pending: list[Command] = []
    for takeover in live.takeovers:
        for spec in takeover.sources:
            worker_id, held = spec.gpus[0], live.leader(spec)
            heard_of = live.gone(worker_id) or live.view.reported(worker_id)
            runs = held is not None and held.phase in STANDS_OR_RUNS
            if (heard_of and not runs) or live.stands(spec) or lets_go(live, spec):
                continue
            pending.append(
                PauseReplica(
                    epoch=live.switch.epoch,
                    worker_id=worker_id,
                    replica_id=spec.replica_id,
                    shares=takeover.shares,
                )
            )
    return pending


def takes(live: Live) -> list[Command]:
    """Leaders that still have to take requests over."""
    pending: list[Command] = []
    for takeover in live.takeovers:
        sources = [spec for spec in takeover.sources if live.stands(spec)]
        workers = [gpu for spec in (*takeover.sources, *takeover.takers) for gpu in spec.gpus]
        for spec in takeover.takers if sources else ():
            held = live.leader(spec)
            if held is not None and held.taken >= live.switch.epoch:
                continue
            pending.append(
                TakeRequests(
                    epoch=live.switch.epoch,
                    worker_id=spec.gpus[0],
                    replica_id=spec.replica_id,
                    sources=_leaders(sources),
                    peers=live.view.peers(workers),
                    shares=takeover.shares,
                )
            )
    return pending


def activations(live: Live) -> list[Command]:
    """Ranks that still have to go on with what they hold. What is lost or broken by now is
    started anew by the settled state's repairs."""
    switch, view = live.switch, live.view
    pending: list[Command] = []
    for spec in live.targets:
        for worker_id in spec.gpus:
            part = (worker_id, spec.replica_id)
            held = view.held(part)
            if live.gone(worker_id) or view.leaving(worker_id):
                continue
            if live.course.lost(part, view):
                continue
            if held is not None and (held.phase == "failed" or _active(held, switch.epoch)):
                continue
            pending.append(
                StartReplica(
                    epoch=switch.epoch,
                    worker_id=worker_id,
                    replica=spec,
                    peers=view.peers(spec.gpus),
                )
            )
    return pending


def left_out(live: Live) -> Iterable[str]:
    """Whose requests nobody takes over, and why, for the report."""
    for spec in leaving(live.switch.origin, live.switch.target):
        held = live.leader(spec)
        if live.gone(spec.gpus[0]) or (held is not None and held.phase == "failed"):
            yield f"{spec.replica_id} was lost: its requests are replayed"
        elif lets_go(live, spec):
            yield f"{spec.replica_id} drains: its requests end there, or are handed back"


def _active(held: HostedReplica, epoch: int) -> bool:
    return held.phase == "serving" and held.epoch >= epoch and not held.taken


def _leaders(specs: Iterable[ReplicaSpec]) -> dict[str, str]:
    return {spec.replica_id: spec.gpus[0] for spec in specs}
