"""What the switcher tells everyone: the plan in force, and how each switch begins and ends."""

from typing import Any

from services.switcher import walk
from services.switcher.machine import Switch
from shared import subjects
from shared.core import Publish
from shared.messages.base import Message
from shared.messages.plans import PlanInForce, StoredPlan, SwitchEnded, SwitchStarted


def plan_in_force(stored: StoredPlan) -> Publish:
    return subjects.PLAN_IN_FORCE.send(
        PlanInForce(
            epoch=stored.epoch,
            plan=stored.in_force,
            switching_to=stored.target.plan_id if stored.target else "",
        )
    )


def switch_started(switch: Switch, stored: StoredPlan) -> Publish:
    going = walk.leaving(stored.in_force, switch.target)
    coming = walk.arriving(stored.in_force, switch.target)
    return subjects.SWITCH_STARTED.send(
        SwitchStarted(
            epoch=switch.epoch,
            plan_id=switch.target.plan_id,
            replicas_stopping=tuple(spec.replica_id for spec in going),
            replicas_starting=tuple(spec.replica_id for spec in coming),
        )
    )


def switch_ended(switch: Switch, now_s: float) -> SwitchEnded:
    """The end of a switch, or of the rollback that stands for the failed one."""
    failed = switch.failed
    return SwitchEnded(
        epoch=switch.failed_epoch or switch.epoch,
        plan_id=failed.plan_id if failed else switch.target.plan_id,
        succeeded=not switch.rolling_back,
        took_s=now_s - switch.started_s,
        detail=switch.why,
    )


def fields(message: Message) -> dict[str, Any]:
    """A message as the fields of a log line."""
    return {name: getattr(message, name) for name in message.__struct_fields__}
