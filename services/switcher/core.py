"""Switcher core: brings the workers to the adopted plan, and is the one writer of that plan.

The states are in machine.py, what is believed of the workers in view.py, what they are told in
walk.py and how that goes on in walker.py; this file joins them to events. Of the network it
assumes nothing but that what is repeated arrives some time: commands are sent again until answered,
phases have deadlines, each switch has an epoch of its own, and the plan is written by
compare-and-set, so that a second switcher (one thought dead that comes back) finds out and follows.
"""

from collections.abc import Iterable

from services.switcher import announce, events, machine
from services.switcher.config import SwitcherConfig
from services.switcher.events import (
    INPUTS,
    KEY,
    NOTHING,
    PLAN_TRANSFER,
    PhaseDeadline,
    SwitcherEvent,
    Tick,
    TransferPlanned,
)
from services.switcher.machine import State, Switch
from services.switcher.staging import as_begun
from services.switcher.view import WorkerView
from services.switcher.walker import Walker
from services.switcher.way import way_to
from shared import core
from shared.core import Effect, Log
from shared.messages import replicas
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanInForce, StoredPlan

__all__ = ["INPUTS", "KEY", "NOTHING", "PLAN_TRANSFER", "Switcher", "SwitcherEvent"]


class Switcher:
    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._walker = Walker(config)

    def step(self, event: SwitcherEvent, now_s: float) -> list[Effect]:
        self._walker.view.listen(now_s)
        match event:
            case core.Started():
                effects = self._on_started(now_s)
            case AdoptPlan():
                effects = self._on_adopt_plan(event, now_s)
            case PlanInForce():
                effects = self._on_plan_in_force(event, now_s)
            case replicas.WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case core.Loaded() | core.Stored() | core.StoreConflict():
                effects = self._on_bucket(event, now_s)
            case TransferPlanned():
                effects = self._on_transfer_planned(event, now_s)
            case Tick():
                effects = self._on_tick(now_s)
            case PhaseDeadline():
                effects = self._on_phase_deadline(event, now_s)
            case core.Draining():
                effects = ()  # a switch under way is walked on by whoever starts next
            case _:  # of a replica: the type says that nothing else is left
                effects = self._on_replica_event(event, now_s)
        return list(effects)

    def check(self) -> None:
        self._walker.check()

    @property
    def state(self) -> State:
        return self._walker.state

    @property
    def stored(self) -> StoredPlan | None:
        return self._walker.ledger.stored

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        timeout_s = self._config.worker_timeout_s
        self._walker.view = WorkerView(worker_timeout_s=timeout_s, started_s=now_s)
        yield self._walker.ledger.load()
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())

    def _on_adopt_plan(self, event: AdoptPlan, now_s: float) -> Iterable[Effect]:
        stored, plan = self.stored, event.plan
        if stored is None or self.state == "loading":
            return
        walker = self._walker
        under_way = walker.switch.plan_ids if walker.switch else ()
        if plan.plan_id in (stored.in_force.plan_id, *under_way):
            return
        refusal = walker.refusals.refusal(event, self.state, stored, now_s)
        if refusal:
            if walker.refusals.is_new(plan.plan_id, refusal):
                yield Log("plan.refused", {"plan_id": plan.plan_id, "reason": refusal}, "warning")
            return
        yield from walker.begin(self._switch_to(plan, stored, now_s), stored, now_s)

    def _switch_to(self, plan: DeploymentPlan, stored: StoredPlan, now_s: float) -> Switch:
        """Live, unless something is against it that is known now, or it was tried in vain."""
        walker = self._walker
        way, why = way_to(stored.in_force, plan, walker.view, now_s)
        if way == "live":
            way, why = walker.refusals.way_to(plan.plan_id)
        return Switch(
            origin=stored.in_force,
            target=plan,
            epoch=walker.next_epoch(),
            started_s=now_s,
            way=way,
            way_why=why,
        )

    def _on_plan_in_force(self, event: PlanInForce, now_s: float) -> Iterable[Effect]:
        """Our own copies tell nothing new; one from a later epoch means a second switcher."""
        if self.stored is not None and event.epoch > self.stored.epoch:
            why = f"another switcher has put epoch {event.epoch} in force"
            yield from self._walker.reload(why, now_s)

    def _on_worker_report(self, report: replicas.WorkerReport, now_s: float) -> Iterable[Effect]:
        if self._walker.view.on_report(report, now_s):
            yield from self._walker.advance(now_s)

    def _on_replica_event(self, event: events.ReplicaEvent, now_s: float) -> Iterable[Effect]:
        walker = self._walker
        walker.view.on_event(event)
        if walker.course is not None:
            walker.course.on_event(event)
        if isinstance(event, replicas.ReplicaFailed):
            what = "command.refused" if event.refused else "replica.failed"
            yield Log(what, announce.fields(event), "warning")
        if self.state != "settled":  # there the report that follows says more: why it changed
            yield from walker.advance(now_s)

    def _on_bucket(self, event: events.BucketEvent, now_s: float) -> Iterable[Effect]:
        walker, ledger = self._walker, self._walker.ledger
        match event:
            case core.Loaded() if self.state != "loading":
                ledger.looking = False
                if self.state == "settled" and event.revision != ledger.revision:
                    yield from walker.reload("the plan was written by another switcher", now_s)
            case core.Loaded(message=StoredPlan() as stored):
                ledger.revision = event.revision
                yield from walker.follow(stored, now_s)
            case core.Loaded():
                # An empty bucket under a running switcher was wiped: what we know is better.
                ledger.revision = event.revision
                yield ledger.write(ledger.stored or NOTHING)
            case core.Stored():
                if ledger.writing is not None:  # else we are loading what it has become
                    ledger.revision = event.revision
                    yield from walker.follow(ledger.writing, now_s)
            case core.StoreConflict():
                yield from walker.reload("the plan was written by another switcher", now_s)

    def _on_transfer_planned(self, planned: TransferPlanned, now_s: float) -> Iterable[Effect]:
        switch, course = self._walker.switch, self._walker.course
        if switch is None or course is None or self.state != "preparing":
            return
        if planned.epoch != switch.epoch or course.planned is not None:
            return
        view, stages_max = self._walker.view, self._config.stages_max
        planned = course.planned = as_begun(planned, switch, course, view, stages_max=stages_max)
        told = {
            "epoch": switch.epoch, "bytes": planned.bytes_total, "bound": planned.bytes_bound,
            "stages": len(planned.stages), "failure": planned.failure,
            "took_s": planned.took_s, "notes": planned.notes,
        }  # fmt: skip
        yield Log("switch.planned", told)
        yield from self._walker.advance(now_s)

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())
        walker = self._walker
        if self.stored is None or self.state == "loading":
            return
        walker.prune(now_s)
        yield from walker.advance(now_s)
        yield from walker.progress(now_s)
        if now_s - walker.published_s >= self._config.publish_period_s:
            yield walker.plan_in_force(now_s)
            if self.state == "settled" and not walker.ledger.looking:
                # A second switcher may have written a target and died: nobody else would tell us.
                yield walker.ledger.look()

    def _on_phase_deadline(self, event: PhaseDeadline, now_s: float) -> Iterable[Effect]:
        walker, switch, state = self._walker, self._walker.switch, self.state
        if switch is None or event != walker.deadline or event.state != state:
            return
        told = {"epoch": switch.epoch, "state": state, "why": switch.why, "waits": walker.waits}
        late = f"{state} did not end within its time"
        if state == "rolling_back":
            yield Log("rollback.late", told, "error")
            yield from walker.commit(now_s)
        elif state in machine.GO_ON_LATE:
            yield Log("switch.late", told, "warning")
            if walker.course is not None:
                walker.course.note(late)
            yield from walker.enter(machine.GO_ON_LATE[state], now_s)
        else:
            yield Log("switch.late", told, "warning")
            yield from walker.roll_back(late, now_s)
