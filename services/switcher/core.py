"""Switcher core: brings the workers to the adopted plan, and is the one writer of that plan.

The states are in machine.py, what is believed of the workers in view.py, what they are told in
walk.py; this file joins them to events. Of the network it assumes nothing but that what is
repeated arrives some time: commands are sent again until answered, phases have deadlines, each
switch has an epoch of its own, and the plan is written by compare-and-set, so that a second
switcher (one thought dead that comes back) finds out and follows.
"""

from collections.abc import Iterable
from typing import assert_never

from services.switcher import walk
from services.switcher.config import SwitcherConfig
from services.switcher.machine import MOVES, WALKING, State, Switch
from services.switcher.refusals import Refusals
from services.switcher.view import Part, WorkerView
from shared import subjects
from shared.core import (
    Draining,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    SetTimer,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.messages.base import Message
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PlanInForce,
    StoredPlan,
    SwitchEnded,
    SwitchStarted,
)
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaStarted,
    ReplicaStopped,
    WorkerReport,
)

KEY = "plan"
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


ReplicaEvent = ReplicaStarted | ReplicaDrained | ReplicaStopped | ReplicaFailed
SwitcherEvent = (
    Started
    | Draining
    | AdoptPlan
    | PlanInForce
    | WorkerReport
    | ReplicaEvent
    | Loaded
    | Stored
    | StoreConflict
    | Tick
    | PhaseDeadline
)
NOTHING = StoredPlan(epoch=0, in_force=DeploymentPlan(plan_id="none", reason="nothing adopted yet"))


class Switcher:
    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._state: State = "loading"
        self._stored: StoredPlan | None = None  # what the bucket holds, as far as we know
        self._revision = 0
        self._writing: StoredPlan | None = None  # what we have asked it to hold
        self._switch: Switch | None = None
        self._view = WorkerView(worker_timeout_s=config.worker_timeout_s, started_s=0.0)
        self._sent: dict[tuple[str, Part, int], float] = {}
        self._published_s = float("-inf")
        self._refusals = Refusals(config.refusal_s, config.refusal_s_max)

    def step(self, event: SwitcherEvent, now_s: float) -> list[Effect]:
        match event:
            case Started():
                effects = self._on_started(now_s)
            case AdoptPlan():
                effects = self._on_adopt_plan(event, now_s)
            case PlanInForce():
                effects = self._on_plan_in_force(event)
            case WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case ReplicaStarted() | ReplicaDrained() | ReplicaStopped() | ReplicaFailed():
                effects = self._on_replica_event(event, now_s)
            case Loaded():
                effects = self._on_loaded(event, now_s)
            case Stored():
                effects = self._on_stored(event, now_s)
            case StoreConflict():
                effects = self._reload("the plan was written by another switcher")
            case Tick():
                effects = self._on_tick(now_s)
            case PhaseDeadline():
                effects = self._on_phase_deadline(event, now_s)
            case Draining():
                effects = ()  # a switch under way is walked on by whoever starts next
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        state, switch, stored = self._state, self._switch, self._stored
        assert (state in {"storing_target", "committing"}) <= (self._writing is not None), state
        assert (state == "settled") <= (switch is None), (state, switch)
        if state in WALKING:
            assert switch is not None, state
            assert stored is not None, state
            assert stored.target_epoch == switch.epoch > stored.epoch, (stored, switch)
            assert switch.rolling_back == (state == "rolling_back"), (state, switch)
        assert len(self._sent) <= 4096, len(self._sent)  # noqa: PLR2004  # cleared in each phase

    @property
    def state(self) -> State:
        return self._state

    @property
    def stored(self) -> StoredPlan | None:
        return self._stored

    # Events

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._view = WorkerView(worker_timeout_s=self._config.worker_timeout_s, started_s=now_s)
        yield Load(KEY, StoredPlan)
        yield SetTimer(now_s + self._config.command_retry_s, Tick())

    def _on_adopt_plan(self, event: AdoptPlan, now_s: float) -> Iterable[Effect]:
        stored, plan = self._stored, event.plan
        if stored is None or self._state == "loading":
            return
        if self._switch is not None and plan.plan_id in self._switch_ids():
            return
        if plan.plan_id == stored.in_force.plan_id:
            return
        refusal = ""
        if self._state != "settled":
            refusal = f"a switch is under way ({self._state})"
        elif event.based_on_epoch != stored.epoch:
            refusal = f"based on epoch {event.based_on_epoch}, in force is {stored.epoch}"
        elif faults := walk.faults_of(plan):
            refusal = f"invalid: {faults}"
        elif (wait_s := self._refusals.wait_s(plan.plan_id, now_s)) > 0:
            refusal = f"it failed before and is refused for {wait_s:.0f} s"
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

    def _on_worker_report(self, report: WorkerReport, now_s: float) -> Iterable[Effect]:
        if self._view.on_report(report, now_s):
            yield from self._advance(now_s)

    def _on_replica_event(self, event: ReplicaEvent, now_s: float) -> Iterable[Effect]:
        self._view.on_event(event)
        if isinstance(event, ReplicaFailed):
            yield Log(
                "replica.failed",
                {
                    "replica_id": event.replica_id,
                    "worker_id": event.worker_id,
                    "epoch": event.epoch,
                    "detail": event.detail,
                },
                "warning",
            )
        yield from self._advance(now_s)

    def _on_loaded(self, event: Loaded, now_s: float) -> Iterable[Effect]:
        self._revision = event.revision
        stored = event.message
        if not isinstance(stored, StoredPlan):
            # An empty bucket under a running switcher was wiped: what we know is better.
            yield from self._write(self._stored or NOTHING)
            return
        yield from self._follow(stored, now_s)

    def _on_stored(self, event: Stored, now_s: float) -> Iterable[Effect]:
        stored, self._writing = self._writing, None
        if stored is None:
            return
        self._revision = event.revision
        yield from self._follow(stored, now_s)

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.command_retry_s, Tick())
        if self._stored is not None and self._state != "loading":
            yield from self._advance(now_s)
            if now_s - self._published_s >= self._config.publish_period_s:
                yield self._plan_in_force(now_s)

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

    # The walk

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
            self._sent.clear()
            self._view.prune(epoch=stored.epoch, now_s=now_s)
            if switch is not None and switch.epoch == stored.epoch:
                yield from self._ended(switch, now_s)
            elif before is None:
                yield Log("plan.recovered", {"epoch": stored.epoch, "switching": False})
            yield self._plan_in_force(now_s)
            yield from self._advance(now_s)
            return
        switch = self._switch
        if switch is None or switch.epoch != stored.target_epoch:
            back = stored.target.plan_id == stored.in_force.plan_id
            why = "a rollback was under way when the switcher started" if back else ""
            switch = Switch(
                target=stored.target, epoch=stored.target_epoch, started_s=now_s, why=why
            )
            self._switch = switch
            yield Log("plan.recovered", {"epoch": stored.epoch, "switching": True})
        elif not switch.rolling_back:
            yield self._switch_started(switch, stored)
        yield self._plan_in_force(now_s)
        yield from self._enter("rolling_back" if switch.rolling_back else "draining", now_s)

    def _enter(self, state: State, now_s: float) -> Iterable[Effect]:
        switch, config = self._switch, self._config
        assert switch is not None, state
        self._move(state)
        self._sent.clear()
        timeout_s = {
            "draining": config.drain_timeout_s + config.drain_grace_s,
            "stopping": config.stop_timeout_s,
            "starting": config.start_timeout_s,
            "rolling_back": config.stop_timeout_s + config.start_timeout_s,
        }[state]
        yield SetTimer(now_s + timeout_s, PhaseDeadline(epoch=switch.epoch, state=state))
        yield from self._advance(now_s)

    def _advance(self, now_s: float) -> Iterable[Effect]:
        """Send what the present phase still needs; if that is nothing, go to the next."""
        stored, switch, view = self._stored, self._switch, self._view
        if stored is None:
            return
        if self._state == "settled":
            if stored.epoch > 0:
                commands = walk.repairs(stored.in_force, view, now_s, epoch=stored.epoch)
                yield from self._send(commands, now_s)
            return
        if switch is None:
            return
        origin, timeout_s = stored.in_force, self._config.drain_timeout_s
        commands: list[walk.Command] = []
        after: State | None = None
        match self._state:
            case "draining":
                commands = walk.drains(origin, switch, view, now_s, timeout_s=timeout_s)
                after = "stopping"
            case "stopping":
                commands = walk.stops(origin, switch, view, now_s)
                after = "starting"
            case "starting":
                commands, failure = walk.starts(origin, switch, view, now_s)
                if failure:
                    yield from self._roll_back(failure, now_s)
                    return
                after = "committing"
            case "rolling_back":
                commands, done = walk.restored(switch, view, now_s, epoch=switch.epoch)
                after = "committing" if done else None
            case _:
                return
        if commands or after is None:
            yield from self._send(commands, now_s)
        elif after == "committing":
            yield from self._commit()
        else:
            yield from self._enter(after, now_s)

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
        yield Log("switch.rollback", {"epoch": failed.epoch, "reason": why}, "warning")
        back = Switch(
            target=stored.in_force,
            epoch=self._next_epoch(),
            started_s=failed.started_s,
            why=why,
            failed=failed.target,
            failed_epoch=failed.epoch,
        )
        self._refusals.failed(failed.target.plan_id, now_s)
        yield from self._begin(back, stored)

    def _ended(self, switch: Switch, now_s: float) -> Iterable[Effect]:
        plan_id = switch.failed.plan_id if switch.failed else switch.target.plan_id
        if not switch.rolling_back:
            self._refusals.forget(plan_id)
        ended = SwitchEnded(
            epoch=switch.failed_epoch or switch.epoch,
            plan_id=plan_id,
            succeeded=not switch.rolling_back,
            took_s=now_s - switch.started_s,
            detail=switch.why,
        )
        yield Log("switch.ended", {f: getattr(ended, f) for f in ended.__struct_fields__})
        yield subjects.SWITCH_ENDED.send(ended)

    # Leaves

    def _move(self, state: State) -> None:
        assert state in MOVES[self._state], (self._state, state)
        self._state = state

    def _reload(self, why: str) -> Iterable[Effect]:
        if self._state == "loading" and self._writing is None:
            return  # the answer is under way
        self._move("loading")
        self._writing = None
        yield Log("plan.reload", {"reason": why}, "warning")
        yield Load(KEY, StoredPlan)

    def _write(self, plan: StoredPlan) -> Iterable[Effect]:
        self._writing = plan
        yield Store(KEY, plan, self._revision)

    def _next_epoch(self) -> int:
        """Above every epoch ever used, as far as the bucket, the workers and we remember."""
        stored = self._stored
        assert stored is not None
        used = self._switch.epoch if self._switch else 0
        return max(stored.epoch, stored.target_epoch, used, self._view.epoch_max) + 1

    def _send(self, commands: list[walk.Command], now_s: float) -> Iterable[Publish]:
        """Publish those not sent within their retry time; a part that keeps failing waits
        twice as long each time."""
        config = self._config
        for command in commands:
            part = walk.part_of(command)
            failures = min(self._view.failures.get(part, 0), 16)
            retry_s = min(config.command_retry_s * 2**failures, config.repair_retry_s_max)
            key = (type(command).__name__, part, command.epoch)
            if now_s - self._sent.get(key, float("-inf")) >= retry_s:
                self._sent[key] = now_s
                yield walk.publish(command)

    def _plan_in_force(self, now_s: float) -> Publish:
        stored = self._stored
        assert stored is not None
        self._published_s = now_s
        return subjects.PLAN_IN_FORCE.send(
            PlanInForce(
                epoch=stored.epoch,
                plan=stored.in_force,
                switching_to=stored.target.plan_id if stored.target else "",
            )
        )

    def _switch_ids(self) -> set[str]:
        """Plans that a repeated wish for is no news of while this switch is under way."""
        switch = self._switch
        assert switch is not None
        return {switch.target.plan_id} | ({switch.failed.plan_id} if switch.failed else set())

    @staticmethod
    def _switch_started(switch: Switch, stored: StoredPlan) -> Publish:
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
