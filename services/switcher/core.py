"""Switcher core: brings the workers to the adopted plan, and is the one writer of that plan.

The states are in machine.py, what is believed of the workers in view.py, what they are told in
walk.py; this file joins them to events. Of the network it assumes nothing but that what is
repeated arrives some time: commands are sent again until answered, phases have deadlines, each
switch has an epoch of its own, and the plan is written by compare-and-set, so that a second
switcher (one thought dead that comes back) finds out and follows.
"""

from collections.abc import Iterable
from typing import assert_never

import msgspec

from services.switcher import announce, events, machine, walk
from services.switcher.commands import Command
from services.switcher.config import SwitcherConfig
from services.switcher.course import Course
from services.switcher.differences import arriving, parts
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
from services.switcher.ledger import Ledger
from services.switcher.live import Live, lost_sources
from services.switcher.machine import State, Switch
from services.switcher.pacing import Pacing
from services.switcher.refusals import Refusals
from services.switcher.view import WorkerView
from services.switcher.way import way_to
from shared import core, subjects
from shared.core import Effect, Log
from shared.messages import replicas
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanInForce, StoredPlan

__all__ = ["INPUTS", "KEY", "NOTHING", "PLAN_TRANSFER", "Switcher"]


class Switcher:
    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._state: State = "loading"
        self._ledger = Ledger()
        self._switch: Switch | None = None
        self._course: Course | None = None
        self._view = WorkerView(worker_timeout_s=config.worker_timeout_s, started_s=0.0)
        self._pacing = Pacing(config)
        self._published_s = float("-inf")
        self._refusals = Refusals(config.refusal_s, config.refusal_s_max)

    def step(self, event: SwitcherEvent, now_s: float) -> list[Effect]:
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
            case (
                replicas.ReplicaStarted()
                | replicas.ReplicaDrained()
                | replicas.ReplicaStopped()
                | replicas.ReplicaFailed()
                | replicas.ReplicaPrepared()
                | replicas.ReplicaPaused()
                | replicas.RequestsTaken()
            ):
                effects = self._on_replica_event(event, now_s)
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        state, switch, stored = self._state, self._switch, self._ledger.stored
        writing = self._ledger.writing
        assert (state in {"storing_target", "committing"}) <= (writing is not None), state
        assert (state == "settled") <= (switch is None), (state, switch)
        assert (switch is None) == (self._course is None), (switch, self._course)
        if state in machine.WALKING:
            assert stored is not None, state
            assert switch is not None, state
            assert switch.rolling_back == (state == "rolling_back"), (state, switch)
        if state in machine.TOWARDS and stored is not None and switch is not None:
            assert stored.target is not None, stored
            assert switch.leads_to(stored.target_epoch, stored.target), (stored, switch)
            assert switch.epoch > stored.epoch, (stored, switch)
        if state in machine.BEYOND and stored is not None and switch is not None:
            assert switch.leads_to(stored.epoch, stored.in_force), (stored, switch)

    @property
    def state(self) -> State:
        return self._state

    @property
    def stored(self) -> StoredPlan | None:
        return self._ledger.stored

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._view = WorkerView(worker_timeout_s=self._config.worker_timeout_s, started_s=now_s)
        yield self._ledger.load()
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())

    def _on_adopt_plan(self, event: AdoptPlan, now_s: float) -> Iterable[Effect]:
        stored, plan = self.stored, event.plan
        if stored is None or self._state == "loading":
            return
        under_way = self._switch.plan_ids if self._switch else ()
        if plan.plan_id in (stored.in_force.plan_id, *under_way):
            return
        refusal = self._refusals.refusal(event, self._state, stored, now_s)
        if refusal:
            if self._refusals.is_new(plan.plan_id, refusal):
                yield Log("plan.refused", {"plan_id": plan.plan_id, "reason": refusal}, "warning")
            return
        switch = self._switch_to(plan, stored, now_s)
        self._course = Course(switch, self._state, now_s)
        yield from self._begin(switch, stored, now_s)

    def _switch_to(self, plan: DeploymentPlan, stored: StoredPlan, now_s: float) -> Switch:
        way, why = way_to(stored.in_force, plan, self._view, now_s)
        if way == "live" and (before := self._refusals.not_live(plan.plan_id)):
            way, why = "reload", before
        return Switch(
            origin=stored.in_force,
            target=plan,
            epoch=self._next_epoch(),
            started_s=now_s,
            way=way,
            way_why=why,
        )

    def _on_plan_in_force(self, event: PlanInForce, now_s: float) -> Iterable[Effect]:
        """Our own copies tell nothing new; one from a later epoch means a second switcher."""
        if self.stored is not None and event.epoch > self.stored.epoch:
            yield from self._reload(f"another switcher has put epoch {event.epoch} in force", now_s)

    def _on_worker_report(self, report: replicas.WorkerReport, now_s: float) -> Iterable[Effect]:
        if self._view.on_report(report, now_s):
            yield from self._advance(now_s)

    def _on_replica_event(self, event: events.ReplicaEvent, now_s: float) -> Iterable[Effect]:
        self._view.on_event(event)
        if self._course is not None:
            self._course.on_event(event)
        if isinstance(event, replicas.ReplicaFailed):
            yield Log("replica.failed", announce.fields(event), "warning")
        if self._state != "settled":  # there the report that follows says more: why it changed
            yield from self._advance(now_s)

    def _on_bucket(self, event: events.BucketEvent, now_s: float) -> Iterable[Effect]:
        ledger = self._ledger
        match event:
            case core.Loaded() if self._state != "loading":
                ledger.looking = False
                if self._state == "settled" and event.revision != ledger.revision:
                    yield from self._reload("the plan was written by another switcher", now_s)
            case core.Loaded(message=StoredPlan() as stored):
                ledger.revision = event.revision
                yield from self._follow(stored, now_s)
            case core.Loaded():
                # An empty bucket under a running switcher was wiped: what we know is better.
                ledger.revision = event.revision
                yield ledger.write(ledger.stored or NOTHING)
            case core.Stored():
                if ledger.writing is not None:  # else we are loading what it has become
                    ledger.revision = event.revision
                    yield from self._follow(ledger.writing, now_s)
            case core.StoreConflict():
                yield from self._reload("the plan was written by another switcher", now_s)

    def _on_transfer_planned(self, planned: TransferPlanned, now_s: float) -> Iterable[Effect]:
        switch, course = self._switch, self._course
        if switch is None or course is None or self._state != "preparing":
            return
        if planned.epoch != switch.epoch or course.planned is not None:
            return
        staged = len(planned.stages) > 1
        if staged and course.left_over(parts(arriving(switch.origin, switch.target)), self._view):
            failure = "in stages that were planned by another switcher"
            planned = TransferPlanned(epoch=planned.epoch, failure=failure)
        course.planned = planned
        told = {
            "epoch": switch.epoch, "bytes": planned.bytes_total, "bound": planned.bytes_bound,
            "stages": len(planned.stages), "failure": planned.failure,
            "took_s": planned.took_s, "notes": planned.notes,
        }  # fmt: skip
        yield Log("switch.planned", told)
        yield from self._advance(now_s)

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())
        if self.stored is None or self._state == "loading":
            return
        self._pacing.prune(now_s)
        yield from self._advance(now_s)
        yield from self._progress(now_s)
        if now_s - self._published_s >= self._config.publish_period_s:
            yield self._plan_in_force(now_s)
            if self._state == "settled" and not self._ledger.looking:
                # A second switcher may have written a target and died: nobody else would tell us.
                yield self._ledger.look()

    def _on_phase_deadline(self, event: PhaseDeadline, now_s: float) -> Iterable[Effect]:
        switch, state = self._switch, self._state
        if switch is None or (event.epoch, event.state) != (switch.epoch, state):
            return
        told = {"epoch": switch.epoch, "state": state, "why": switch.why}
        if state == "rolling_back":
            yield Log("rollback.late", told, "error")
            yield from self._commit(now_s)
        elif late := machine.GO_ON_LATE.get(state):
            yield Log("switch.late", told, "warning")
            self._note(f"{state} did not end within its time")
            yield from self._enter(late, now_s)
        else:
            yield from self._roll_back(f"{state} did not end within its time", now_s)

    def _begin(self, switch: Switch, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """Write the target before anyone is told of it."""
        self._move("storing_target", now_s)
        self._switch = switch
        yield self._ledger.write(
            StoredPlan(
                epoch=stored.epoch,
                in_force=stored.in_force,
                target=switch.target,
                target_epoch=switch.epoch,
                way=switch.way,
            )
        )

    def _follow(self, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """The bucket is known to hold ``stored``: be in the state that it says."""
        before, switch = self._ledger.holds(stored), self._switch
        if stored.target is None:
            done = switch is not None and switch.leads_to(stored.epoch, stored.in_force)
            if not done:
                self._switch = self._course = None
                if before is None:
                    yield Log("plan.recovered", {"epoch": stored.epoch, "switching": False})
            live = done and switch is not None and switch.way == "live" and not switch.why
            # What takes over is told before routers send it anything new.
            yield from self._enter("activating" if live else "settled", now_s)
            return
        if switch is None or not switch.leads_to(stored.target_epoch, stored.target):
            switch = self._switch = machine.recovered(stored, stored.target, now_s)
            self._course = Course(switch, self._state, now_s)
            yield Log("plan.recovered", {"epoch": stored.epoch, "switching": True})
        elif not switch.rolling_back:
            told = {"epoch": switch.epoch, "way": switch.way, "why": switch.way_why}
            yield Log("switch.started", {"plan_id": switch.target.plan_id, **told})
            yield announce.switch_started(switch)
        yield self._plan_in_force(now_s)
        yield from self._enter(switch.first, now_s)
