"""Switcher core: brings the workers to the adopted plan, and is the one writer of that plan.

The states are in machine.py, what is believed of the workers in view.py, what they are told in
walk.py; this file joins them to events. Of the network it assumes nothing but that what is
repeated arrives some time: commands are sent again until answered, phases have deadlines, each
switch has an epoch of its own, and the plan is written by compare-and-set, so that a second
switcher (one thought dead that comes back) finds out and follows.
"""

from collections.abc import Iterable
from typing import assert_never

from services.switcher import announce, events, machine, walk
from services.switcher.config import SwitcherConfig
from services.switcher.events import INPUTS, KEY, NOTHING, PhaseDeadline, SwitcherEvent, Tick
from services.switcher.machine import State, Switch
from services.switcher.pacing import Pacing
from services.switcher.refusals import Refusals
from services.switcher.view import WorkerView
from shared import core, subjects
from shared.core import Effect, Log
from shared.messages import replicas
from shared.messages.plans import AdoptPlan, PlanInForce, StoredPlan

__all__ = ["INPUTS", "KEY", "NOTHING", "Switcher"]


class Switcher:
    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._state: State = "loading"
        self._stored: StoredPlan | None = None  # what the bucket holds, as far as we know
        self._revision = 0
        self._writing: StoredPlan | None = None  # what we have asked it to hold
        self._switch: Switch | None = None
        self._looking = False  # a Load is under way that we do not wait for
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
                effects = self._on_plan_in_force(event)
            case replicas.WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case (
                replicas.ReplicaStarted()
                | replicas.ReplicaDrained()
                | replicas.ReplicaStopped()
                | replicas.ReplicaFailed()
            ):
                effects = self._on_replica_event(event, now_s)
            case core.Loaded() | core.Stored() | core.StoreConflict():
                effects = self._on_bucket(event, now_s)
            case Tick():
                effects = self._on_tick(now_s)
            case PhaseDeadline():
                effects = self._on_phase_deadline(event, now_s)
            case core.Draining():
                effects = ()  # a switch under way is walked on by whoever starts next
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        state, switch, stored = self._state, self._switch, self._stored
        assert (state in {"storing_target", "committing"}) <= (self._writing is not None), state
        assert (state == "settled") <= (switch is None), (state, switch)
        if state in machine.WALKING:
            assert stored is not None, state
            assert switch is not None, state
            assert stored.target is not None, stored
            assert switch.leads_to(stored.target_epoch, stored.target), (stored, switch)
            assert switch.epoch > stored.epoch, (stored, switch)
            assert switch.rolling_back == (state == "rolling_back"), (state, switch)

    @property
    def state(self) -> State:
        return self._state

    @property
    def stored(self) -> StoredPlan | None:
        return self._stored

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._view = WorkerView(worker_timeout_s=self._config.worker_timeout_s, started_s=now_s)
        yield core.Load(KEY, StoredPlan)
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())

    def _on_adopt_plan(self, event: AdoptPlan, now_s: float) -> Iterable[Effect]:
        stored, plan = self._stored, event.plan
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
        switch = Switch(target=plan, epoch=self._next_epoch(), started_s=now_s)
        yield from self._begin(switch, stored)

    def _on_plan_in_force(self, event: PlanInForce) -> Iterable[Effect]:
        """Our own copies tell nothing new; one from a later epoch means a second switcher."""
        if self._stored is not None and event.epoch > self._stored.epoch:
            yield from self._reload(f"another switcher has put epoch {event.epoch} in force")

    def _on_worker_report(self, report: replicas.WorkerReport, now_s: float) -> Iterable[Effect]:
        if self._view.on_report(report, now_s):
            yield from self._advance(now_s)

    def _on_replica_event(self, event: events.ReplicaEvent, now_s: float) -> Iterable[Effect]:
        self._view.on_event(event)
        if isinstance(event, replicas.ReplicaFailed):
            yield Log("replica.failed", announce.fields(event), "warning")
        if self._state != "settled":  # there the report that follows says more: why it changed
            yield from self._advance(now_s)

    def _on_bucket(self, event: events.BucketEvent, now_s: float) -> Iterable[Effect]:
        match event:
            case core.Loaded() if self._state != "loading":
                self._looking = False
                if self._state == "settled" and event.revision != self._revision:
                    yield from self._reload("the plan was written by another switcher")
            case core.Loaded(message=StoredPlan() as stored):
                self._revision = event.revision
                yield from self._follow(stored, now_s)
            case core.Loaded():
                # An empty bucket under a running switcher was wiped: what we know is better.
                self._revision = event.revision
                yield from self._write(self._stored or NOTHING)
            case core.Stored():
                if self._writing is not None:  # else we are loading what it has become
                    self._revision = event.revision
                    yield from self._follow(self._writing, now_s)
            case core.StoreConflict():
                yield from self._reload("the plan was written by another switcher")

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield core.SetTimer(now_s + self._config.command_retry_s, Tick())
        if self._stored is not None and self._state != "loading":
            self._pacing.prune(now_s)
            yield from self._advance(now_s)
            if now_s - self._published_s >= self._config.publish_period_s:
                yield self._plan_in_force(now_s)
                yield from self._look()

    def _look(self) -> Iterable[Effect]:
        """A second switcher may have written a target and died: nobody else would tell us."""
        if self._state == "settled" and not self._looking:
            self._looking = True
            yield core.Load(KEY, StoredPlan)

    def _on_phase_deadline(self, event: PhaseDeadline, now_s: float) -> Iterable[Effect]:
        switch = self._switch
        if switch is None or (event.epoch, event.state) != (switch.epoch, self._state):
            return
        match self._state:
            case "draining":
                yield Log("drain.late", {"epoch": switch.epoch}, "warning")
                yield from self._enter("stopping", now_s)
            case "stopping" | "starting":
                reason = f"{self._state} did not end within its time"
                yield from self._roll_back(reason, now_s)
            case "rolling_back":
                yield Log("rollback.late", {"epoch": switch.epoch, "why": switch.why}, "error")
                yield from self._commit()
            case _:
                assert_never(self._state)  # pyright: ignore[reportArgumentType]  # other states have no deadline

    def _begin(self, switch: Switch, stored: StoredPlan) -> Iterable[Effect]:
        """Write the target before anyone is told of it."""
        self._move("storing_target")
        self._switch = switch
        yield from self._write(
            StoredPlan(
                epoch=stored.epoch,
                in_force=stored.in_force,
                target=switch.target,
                target_epoch=switch.epoch,
            )
        )

    def _follow(self, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """The bucket is known to hold ``stored``: be in the state that it says."""
        before, self._stored, self._writing = self._stored, stored, None
        if stored.target is None:
            switch, self._switch = self._switch, None
            self._move("settled")
            self._pacing.clear()
            self._view.prune(epoch=stored.epoch, now_s=now_s)
            if switch is not None and switch.leads_to(stored.epoch, stored.in_force):
                yield from self._ended(switch, now_s)
            elif before is None:
                yield Log("plan.recovered", {"epoch": stored.epoch, "switching": False})
            yield self._plan_in_force(now_s)
            yield from self._advance(now_s)
            return
        switch = self._switch
        if switch is None or not switch.leads_to(stored.target_epoch, stored.target):
            switch = self._switch = machine.recovered(stored, stored.target, now_s)
            yield Log("plan.recovered", {"epoch": stored.epoch, "switching": True})
        elif not switch.rolling_back:
            yield announce.switch_started(switch, stored)
        yield self._plan_in_force(now_s)
        yield from self._enter("rolling_back" if switch.rolling_back else "draining", now_s)

    def _enter(self, state: State, now_s: float) -> Iterable[Effect]:
        switch = self._switch
        assert switch is not None, state
        self._move(state)
        self._pacing.clear()
        timeout_s = machine.phase_timeout_s(state, self._config)
        yield core.SetTimer(now_s + timeout_s, PhaseDeadline(epoch=switch.epoch, state=state))
        yield from self._advance(now_s)

    def _advance(self, now_s: float) -> Iterable[Effect]:
        """Send what the present phase still needs; if that is nothing, go to the next."""
        stored, switch = self._stored, self._switch
        if self._state == "settled" and stored is not None and stored.epoch > 0:
            timeout_s = self._config.start_timeout_s
            upkeep = walk.upkeep(stored, self._view, now_s, start_timeout_s=timeout_s)
            yield from self._send(upkeep, now_s)
        if stored is None or switch is None or self._state not in machine.WALKING:
            return
        limit_s = self._config.drain_timeout_s
        step = walk.next_step(
            self._state, stored.in_force, switch, self._view, now_s, drain_timeout_s=limit_s
        )
        if step.failure:
            yield from self._roll_back(step.failure, now_s)
        elif step.after == "committing":
            yield from self._commit()
        elif step.after is not None:
            yield from self._enter(step.after, now_s)
        else:
            yield from self._send(step.commands, now_s)

    def _commit(self) -> Iterable[Effect]:
        assert self._switch is not None
        self._move("committing")
        switch = self._switch
        yield from self._write(
            StoredPlan(epoch=switch.epoch, in_force=switch.target, target_epoch=switch.epoch)
        )

    def _roll_back(self, why: str, now_s: float) -> Iterable[Effect]:
        stored, failed = self._stored, self._switch
        assert stored is not None
        assert failed is not None
        self._refusals.failed(failed.target.plan_id, now_s)
        yield Log("switch.rollback", {"epoch": failed.epoch, "reason": why}, "warning")
        back = machine.rollback_of(failed, stored.in_force, epoch=self._next_epoch(), why=why)
        yield from self._begin(back, stored)

    def _ended(self, switch: Switch, now_s: float) -> Iterable[Effect]:
        ended = announce.switch_ended(switch, now_s)
        if ended.succeeded:
            self._refusals.forget(ended.plan_id)
        yield Log("switch.ended", announce.fields(ended))
        yield subjects.SWITCH_ENDED.send(ended)

    def _move(self, state: State) -> None:
        assert state in machine.MOVES[self._state], (self._state, state)
        self._state = state

    def _reload(self, why: str) -> Iterable[Effect]:
        if self._state == "loading" and self._writing is None:
            return  # the answer is under way
        self._move("loading")
        self._writing, self._looking = None, False
        yield Log("plan.reload", {"reason": why}, "warning")
        yield core.Load(KEY, StoredPlan)

    def _write(self, plan: StoredPlan) -> Iterable[Effect]:
        self._writing = plan
        yield core.Store(KEY, plan, self._revision)

    def _next_epoch(self) -> int:
        """Above every epoch ever used, as far as the bucket, the workers and we remember."""
        stored = self._stored or NOTHING
        used = self._switch.epoch if self._switch else 0
        return max(stored.epoch, stored.target_epoch, used, self._view.epoch_max) + 1

    def _send(self, commands: list[walk.Command], now_s: float) -> Iterable[core.Publish]:
        return self._pacing.due(commands, self._view.failures, now_s)

    def _plan_in_force(self, now_s: float) -> core.Publish:
        assert self._stored is not None
        self._published_s = now_s
        return announce.plan_in_force(self._stored)
