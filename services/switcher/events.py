"""What the switcher hears: its subjects, its timers, and the key it owns."""

from shared import subjects
from shared.core import Draining, Loaded, Started, StoreConflict, Stored
from shared.messages.base import Message
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanInForce, StoredPlan
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaStarted,
    ReplicaStopped,
    WorkerReport,
)

KEY = "plan"
NOTHING = StoredPlan(epoch=0, in_force=DeploymentPlan(plan_id="none", reason="nothing adopted yet"))
INPUTS = (
    subjects.ADOPT_PLAN,
    subjects.PLAN_IN_FORCE,
    subjects.WORKER_REPORT,
    subjects.REPLICA_STARTED,
    subjects.REPLICA_DRAINED,
    subjects.REPLICA_STOPPED,
    subjects.REPLICA_FAILED,
)


class Tick(Message, frozen=True, kw_only=True):
    """Timer: send again what is unanswered, notice who fell silent, repeat the plan in force."""


class PhaseDeadline(Message, frozen=True, kw_only=True):
    """Timer: the phase ``state`` of the switch to ``epoch`` should have ended."""

    epoch: int
    state: str


BucketEvent = Loaded | Stored | StoreConflict
ReplicaEvent = ReplicaStarted | ReplicaDrained | ReplicaStopped | ReplicaFailed
SwitcherEvent = (
    Started
    | Draining
    | AdoptPlan
    | PlanInForce
    | WorkerReport
    | ReplicaEvent
    | BucketEvent
    | Tick
    | PhaseDeadline
)
