"""The only file in which a subject is spelled out.

``oserve.v1.<kind>.<noun>.<id>.<verb>``: ``cmd`` commands (one owner each), ``evt`` events, which
the journal keeps, ``rpc`` questions, ``data`` what is frequent and worthless a second later.
"""

from dataclasses import dataclass
from typing import Generic

from shared.core import Publish
from shared.messages import demand, plans, replicas, requests
from shared.messages.base import M

EVENTS = "oserve.v1.evt.>"


@dataclass(frozen=True, slots=True)
class Subject(Generic[M]):
    """A subject pattern and the one message type it carries."""

    pattern: str
    message: type[M]
    snapshot: bool = (
        False  # each message replaces the one before: a receiver may skip to the newest
    )

    @property
    def wildcard(self) -> str:
        return ".".join("*" if t.startswith("{") else t for t in self.pattern.split("."))

    def of(self, **tokens: str) -> "Subject[M]":
        """The subject with some of its tokens filled in."""
        pattern = self.pattern
        for name, value in tokens.items():
            pattern = pattern.replace("{" + name + "}", value)
        return Subject(pattern, self.message, self.snapshot)

    def send(self, message: M, **tokens: str) -> Publish:
        return Publish(self.pattern.format(**tokens), message)


ROUTE = Subject("oserve.v1.rpc.route", requests.RouteRequest)
ROUTE_REPLY = Subject("oserve.v1.data.ingress.{ingress_id}.route", requests.RouteReply)
SUBMIT_REQUEST = Subject("oserve.v1.cmd.worker.{worker_id}.submit", requests.SubmitRequest)
ABORT_REQUEST = Subject("oserve.v1.cmd.worker.{worker_id}.abort", requests.AbortRequest)
TOKEN_CHUNKS = Subject("oserve.v1.data.ingress.{ingress_id}.chunks", requests.TokenChunks)
REQUESTS_COMPLETED = Subject(
    "oserve.v1.evt.ingress.{ingress_id}.completed", requests.RequestsCompleted
)

START_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.start", replicas.StartReplica)
DRAIN_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.drain", replicas.DrainReplica)
STOP_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.stop", replicas.StopReplica)
RESUME_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.resume", replicas.ResumeReplica)
PREPARE_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.prepare", replicas.PrepareReplica)
PAUSE_REPLICA = Subject("oserve.v1.cmd.worker.{worker_id}.pause", replicas.PauseReplica)
TAKE_REQUESTS = Subject("oserve.v1.cmd.worker.{worker_id}.take", replicas.TakeRequests)
ADVANCE_STAGE = Subject("oserve.v1.cmd.worker.{worker_id}.stage", replicas.AdvanceStage)
GROW_CACHE = Subject("oserve.v1.cmd.worker.{worker_id}.grow", replicas.GrowCache)
REPLICA_STARTED = Subject("oserve.v1.evt.replica.{replica_id}.started", replicas.ReplicaStarted)
REPLICA_DRAINED = Subject("oserve.v1.evt.replica.{replica_id}.drained", replicas.ReplicaDrained)
REPLICA_STOPPED = Subject("oserve.v1.evt.replica.{replica_id}.stopped", replicas.ReplicaStopped)
REPLICA_FAILED = Subject("oserve.v1.evt.replica.{replica_id}.failed", replicas.ReplicaFailed)
REPLICA_PREPARED = Subject("oserve.v1.evt.replica.{replica_id}.prepared", replicas.ReplicaPrepared)
REPLICA_PAUSED = Subject("oserve.v1.evt.replica.{replica_id}.paused", replicas.ReplicaPaused)
REQUESTS_TAKEN = Subject("oserve.v1.evt.replica.{replica_id}.taken", replicas.RequestsTaken)
REPLICA_REPORT = Subject(
    "oserve.v1.data.replica.{replica_id}.report", replicas.ReplicaReport, snapshot=True
)
WORKER_REPORT = Subject(
    "oserve.v1.data.worker.{worker_id}.report", replicas.WorkerReport, snapshot=True
)

ADOPT_PLAN = Subject("oserve.v1.cmd.plan.adopt", plans.AdoptPlan)
PIN_PLAN = Subject("oserve.v1.rpc.plan.pin", plans.PinPlan)
RELEASE_PLAN = Subject("oserve.v1.rpc.plan.release", plans.ReleasePlan)
PLAN_IN_FORCE = Subject("oserve.v1.data.plan.in_force", plans.PlanInForce, snapshot=True)
PLAN_PROPOSED = Subject("oserve.v1.evt.plan.proposed", plans.PlanProposed)
PLAN_KEPT = Subject("oserve.v1.evt.plan.kept", plans.PlanKept)
SWITCH_STARTED = Subject("oserve.v1.evt.switch.started", plans.SwitchStarted)
SWITCH_ENDED = Subject("oserve.v1.evt.switch.ended", plans.SwitchEnded)
SWITCH_PROGRESS = Subject("oserve.v1.data.switch.progress", plans.SwitchProgress, snapshot=True)

DEMAND_REPORT = Subject("oserve.v1.evt.demand.reported", demand.DemandReport)
FORECAST_REPORT = Subject("oserve.v1.evt.forecast.reported", demand.ForecastReport)
