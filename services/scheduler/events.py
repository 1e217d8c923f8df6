"""What the scheduler hears: its subjects, its questions, its timers."""

from typing import Any

from services.scheduler.config import PolicyName
from services.scheduler.solving import Solved
from shared import subjects
from shared.core import Draining, Loaded, Query, Started
from shared.messages.base import Message
from shared.messages.demand import DemandReport, ForecastReport
from shared.messages.plans import PinPlan, PlanInForce, ReleasePlan
from shared.messages.replicas import ReplicaFailed, ReplicaReport, WorkerReport
from shared.subjects import Subject

KEY = "plan"
INPUTS = (
    subjects.WORKER_REPORT,
    subjects.PLAN_IN_FORCE,
    subjects.FORECAST_REPORT,
    subjects.DEMAND_REPORT,
    subjects.REPLICA_REPORT,
    subjects.REPLICA_FAILED,
)
QUERIES = ((subjects.PIN_PLAN, "scheduler"), (subjects.RELEASE_PLAN, "scheduler"))
CORRECTING: PolicyName = "oserve"
"""The policy between whose decisions the core corrects weights and plans around what fails; the
others are comparators, whose plans stand for themselves."""


def inputs(policy: PolicyName) -> tuple[Subject[Any], ...]:
    """What the core has to hear under ``policy``: ten reports a second of each replica are for
    those alone that act on them."""
    deaf: set[Subject[Any]] = set()
    if policy == "static":
        deaf.add(subjects.DEMAND_REPORT)
    if policy not in ("dynamo", CORRECTING):
        deaf.add(subjects.REPLICA_REPORT)
    if policy != CORRECTING:
        deaf.add(subjects.REPLICA_FAILED)
    return tuple(subject for subject in INPUTS if subject not in deaf)


class Tick(Message, frozen=True, kw_only=True):
    """Timer: a period has passed."""


class SolveDeadline(Message, frozen=True, kw_only=True):
    """Timer: the solve that started at ``started_s`` has had its time."""

    started_s: float


SchedulerEvent = (
    Started
    | Draining
    | WorkerReport
    | ReplicaReport
    | ReplicaFailed
    | PlanInForce
    | ForecastReport
    | DemandReport
    | Loaded
    | Solved
    | SolveDeadline
    | Tick
    | Query
    | PinPlan  # published without a reply address
    | ReleasePlan  # likewise
)
