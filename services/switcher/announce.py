"""What the switcher tells everyone: the plan in force, and how each switch begins, goes on and
ends."""

from typing import Any

from services.switcher.course import Course
from services.switcher.differences import arriving, leaving, parts
from services.switcher.machine import State, Switch
from services.switcher.view import WorkerView
from shared import subjects
from shared.core import Publish
from shared.messages.base import Message
from shared.messages.plans import (
    PlanInForce,
    StoredPlan,
    SwitchEnded,
    SwitchProgress,
    SwitchStarted,
)


def plan_in_force(stored: StoredPlan) -> Publish:
    return subjects.PLAN_IN_FORCE.send(
        PlanInForce(
            epoch=stored.epoch,
            plan=stored.in_force,
            switching_to=stored.target.plan_id if stored.target else "",
        )
    )


def switch_started(switch: Switch) -> Publish:
    going = leaving(switch.origin, switch.target)
    coming = arriving(switch.origin, switch.target)
    return subjects.SWITCH_STARTED.send(
        SwitchStarted(
            epoch=switch.epoch,
            plan_id=switch.target.plan_id,
            replicas_stopping=tuple(spec.replica_id for spec in going),
            replicas_starting=tuple(spec.replica_id for spec in coming),
            way=switch.way,
            why=switch.way_why,
        )
    )


def switch_progress(
    switch: Switch, state: State, course: Course, view: WorkerView, now_s: float
) -> Publish:
    """Bytes are those of weights, as the workers that fetch them count them."""
    fetched = 0
    for part in parts(arriving(switch.origin, switch.target)):
        held = view.held(part)
        if held is not None and held.epoch >= switch.epoch:
            fetched += held.fetched_bytes
    total = course.planned.bytes_total if course.planned else 0
    return subjects.SWITCH_PROGRESS.send(
        SwitchProgress(
            epoch=switch.epoch,
            plan_id=switch.target.plan_id,
            phase=state,
            bytes_done=min(fetched, total),
            bytes_total=total,
            elapsed_s=now_s - switch.started_s,
        )
    )


def switch_ended(switch: Switch, course: Course, now_s: float) -> SwitchEnded:
    """The end of a switch, or of the rollback that stands for the failed one."""
    failed = switch.failed
    return SwitchEnded(
        epoch=switch.failed_epoch or switch.epoch,
        plan_id=failed.plan_id if failed else switch.target.plan_id,
        succeeded=not switch.rolling_back,
        took_s=now_s - switch.started_s,
        detail=switch.why,
        report=course.report(now_s),
    )


def fields(message: Message) -> dict[str, Any]:
    """A message as the fields of a log line."""
    return {name: getattr(message, name) for name in message.__struct_fields__}
