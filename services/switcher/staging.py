"""Weights in stages, where old and new do not fit side by side. Pure.

First all that goes frees the layers of the stage before, then all that comes fetches the next.
"""

from collections.abc import Iterable

from services.switcher.commands import Command
from services.switcher.course import Course
from services.switcher.differences import arriving, leaving, parts
from services.switcher.events import TransferPlanned
from services.switcher.live import STANDS_OR_RUNS, Live, lets_go
from services.switcher.machine import Switch
from services.switcher.view import WorkerView
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import AdvanceStage, StopReplica


def stage_moves(live: Live) -> list[Command]:
    """What the stage that is not done yet still needs; nothing if all are, or there is only one.
    A replica that goes, and does not stand still, frees nothing: then the phase does not end."""
    planned = live.course.planned
    stages = planned.stages if planned else ()
    if len(stages) < 2:  # noqa: PLR2004  # two are the fewest that take turns
        return []
    going = leaving(live.switch.origin, live.switch.target)
    if headless := list(_headless(live, going)):
        return headless
    giving = [s for s in going if (held := live.leader(s)) and held.phase in STANDS_OR_RUNS]
    for stage in range(1, len(stages)):
        for specs, layers in ((giving, stages[stage - 1]), (live.arriving, (0, 0))):
            pending: list[Command] = [
                AdvanceStage(
                    epoch=live.switch.epoch,
                    worker_id=spec.gpus[0],
                    replica_id=spec.replica_id,
                    stage=stage,
                    layers=layers,
                )
                for spec in specs
                if (held := live.leader(spec)) is None or held.stage < stage
            ]
            if pending:
                return pending
    return []


def stages_done(live: Live) -> int:
    """How many of the stages that wait for the pause are done."""
    planned = live.course.planned
    moves = stage_moves(live)
    stages = [move.stage for move in moves if isinstance(move, AdvanceStage)]
    if moves:
        return min(stages, default=1) - 1
    return len(planned.stages) - 1 if planned else 0


def _headless(live: Live, going: Iterable[ReplicaSpec]) -> Iterable[Command]:
    """Ranks that go and whose leader is lost, or does not stand still: nobody would have them free
    a layer."""
    for spec in going:
        lead = live.leader(spec)
        lost = lead is None or lead.phase == "failed"
        if not lost and not lets_go(live, spec):
            continue
        for worker_id in spec.gpus[1:] if lost else spec.gpus:
            held = None if live.gone(worker_id) else live.view.held((worker_id, spec.replica_id))
            if held is not None and held.phase != "failed":
                yield StopReplica(
                    epoch=live.switch.epoch, worker_id=worker_id, replica_id=spec.replica_id
                )


def as_begun(
    planned: TransferPlanned,
    switch: Switch,
    course: Course,
    view: WorkerView,
    *,
    stages_max: int,
) -> TransferPlanned:
    """``planned``, unless it takes too many stages; or where another switcher has begun this
    switch, with the stages that it told: what is freed must have been fetched in them. It can be
    walked on once all ranks have been told; else ours may be other stages than theirs."""
    failure = ""
    ranks = parts(arriving(switch.origin, switch.target))
    if course.left_over(ranks, view):
        told = {held.stage_layers for part in ranks if (held := view.held(part))}
        ready = all((held := view.held(part)) and held.prepared >= switch.epoch for part in ranks)
        if ready and len(told) == 1:
            return TransferPlanned(
                epoch=planned.epoch,
                copies=planned.copies,
                stages=next(iter(told)) or ((0, 0),),
                bytes_total=planned.bytes_total,
                bytes_bound=planned.bytes_bound,
                notes=planned.notes,
                took_s=planned.took_s,
            )
        if len(planned.stages) > 1 or any(told):
            failure = "another switcher has begun it, in stages, and not all ranks know them"
    elif len(planned.stages) > stages_max:
        failure = f"it would take {len(planned.stages)} stages, more than stages_max = {stages_max}"
    return TransferPlanned(epoch=planned.epoch, failure=failure) if failure else planned
