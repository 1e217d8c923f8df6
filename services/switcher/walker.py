"""The switch under way: its state, and how it gets from one phase to the next. Pure.

What a phase has to command is in walk.py; what makes it begin, and what is heard, in core.py.
"""

from collections.abc import Iterable

from services.switcher import announce, machine, walk
from services.switcher.capacity import shortfalls
from services.switcher.commands import Command
from services.switcher.config import SwitcherConfig
from services.switcher.course import Course
from services.switcher.differences import parts
from services.switcher.events import NOTHING, PLAN_TRANSFER, PhaseDeadline
from services.switcher.ledger import Ledger
from services.switcher.live import Live, left_out
from services.switcher.machine import State, Switch
from services.switcher.pacing import Pacing
from services.switcher.refusals import Refusals
from services.switcher.staging import stages_done
from services.switcher.view import WorkerView
from shared import core, subjects
from shared.core import Effect, Log
from shared.messages.plans import StoredPlan


class Walker:
    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._pacing = Pacing(config)
        self.state: State = "loading"
        self.switch: Switch | None = None
        self.course: Course | None = None
        self.ledger = Ledger()
        self.refusals = Refusals(config.refusal_s, config.refusal_s_max)
        self.view = WorkerView(worker_timeout_s=config.worker_timeout_s, started_s=0.0)
        self.published_s = float("-inf")
        self.waits = ""  # what for, while nothing can be commanded
        self.deadline: PhaseDeadline | None = None  # the last one set

    def check(self) -> None:
        state, switch, stored = self.state, self.switch, self.ledger.stored
        writing = self.ledger.writing
        assert (state in {"storing_target", "committing"}) <= (writing is not None), state
        assert (state == "settled") <= (switch is None), (state, switch)
        assert (switch is None) == (self.course is None), (switch, self.course)
        if state not in machine.WALKING:
            return
        assert stored is not None, state
        assert switch is not None, state
        assert switch.rolling_back == (state == "rolling_back"), (state, switch)
        if state in machine.TOWARDS:
            assert stored.target is not None, stored
            assert switch.leads_to(stored.target_epoch, stored.target), (stored, switch)
            assert switch.epoch > stored.epoch, (stored, switch)
        else:
            assert stored.target is None, stored
            assert switch.leads_to(stored.epoch, stored.in_force), (stored, switch)

    def begin(self, switch: Switch, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """Write the target before anyone is told of it. A rollback goes on with the figures of
        the switch that failed."""
        self._move("storing_target", now_s)
        self.switch = switch
        if self.course is None:
            self.course = Course(switch, self.state, now_s)
        yield self.ledger.write(
            StoredPlan(
                epoch=stored.epoch,
                in_force=stored.in_force,
                target=switch.target,
                target_epoch=switch.epoch,
                way=switch.way,
            )
        )

    def follow(self, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """The bucket is known to hold ``stored``: be in the state that it says."""
        before = self.ledger.holds(stored)
        if stored.target is not None:
            yield from self._walk_on(stored, now_s)
            return
        switch = self.switch
        if switch is None or not switch.leads_to(stored.epoch, stored.in_force):
            self.switch = self.course = None
            if before is None:
                yield Log("plan.recovered", {"epoch": stored.epoch, "switching": False})
            yield from self._settle(now_s)
        elif switch.way == "live" and not switch.rolling_back:
            # Who takes over is told so before routers are told to send it anything new.
            yield from self.enter("activating", now_s)
            if self.state != "settled":
                yield self.plan_in_force(now_s)
        else:
            yield from self._settle(now_s)

    def _walk_on(self, stored: StoredPlan, now_s: float) -> Iterable[Effect]:
        """To the target in the bucket, ours or another switcher's."""
        assert stored.target is not None
        switch = self.switch
        if switch is None or not switch.leads_to(stored.target_epoch, stored.target):
            switch = self.switch = machine.recovered(stored, stored.target, now_s)
            self.course = Course(switch, switch.first, now_s)
            yield Log("plan.recovered", {"epoch": stored.epoch, "switching": True})
        elif not switch.rolling_back:
            told = {"plan_id": switch.target.plan_id, "way": switch.way, "why": switch.way_why}
            yield Log("switch.started", {"epoch": switch.epoch, **told})
            yield announce.switch_started(switch)
        yield self.plan_in_force(now_s)
        yield from self.enter(switch.first, now_s)

    def enter(self, state: State, now_s: float) -> Iterable[Effect]:
        if state == "settled":
            yield from self._settle(now_s)
            return
        assert self.switch is not None, state
        self._move(state, now_s)
        self._pacing.clear()
        yield self._time(PhaseDeadline(epoch=self.switch.epoch, state=state), now_s)
        yield from self.advance(now_s)
        if self.state == state:  # a phase that has nothing to do is no news
            yield from self.progress(now_s)

    def advance(self, now_s: float) -> Iterable[Effect]:
        """Send what the present phase still needs; if that is nothing, go to the next."""
        stored = self.ledger.stored
        if self.state == "settled" and stored is not None and stored.epoch > 0:
            timeout_s = self._config.start_timeout_s
            upkeep = walk.upkeep(stored, self.view, now_s, start_timeout_s=timeout_s)
            yield from self._send(upkeep, now_s)
        if self.state not in machine.WALKING:
            return
        now = self._now(now_s)
        if now.switch.way == "live":
            now.course.see(parts(now.targets), self.view)
            yield from self._extend(now)
        limit_s = self._config.drain_timeout_s
        step = walk.next_step(self.state, now, drain_timeout_s=limit_s)
        if step.failure:
            yield from self.roll_back(step.failure, now_s)
        elif step.after == "committing":
            yield from self.commit(now_s)
        elif step.after is not None:
            yield from self.enter(step.after, now_s)
        elif step.plan is not None:
            now.course.asked = step.plan
            yield core.Start(PLAN_TRANSFER, step.plan)
        else:
            if step.waits and step.waits != self.waits:
                yield Log("switch.waits", {"epoch": now.switch.epoch, "for": step.waits})
            self.waits = step.waits
            yield from self._send(step.commands, now_s)

    def commit(self, now_s: float) -> Iterable[Effect]:
        now = self._now(now_s)
        if now.switch.way == "live" and not now.switch.rolling_back:
            for note in (*left_out(now), *shortfalls(now)):
                now.course.note(note)
                yield Log("switch.note", {"epoch": now.switch.epoch, "note": note}, "warning")
        self._move("committing", now_s)
        switch = now.switch
        yield self.ledger.write(
            StoredPlan(epoch=switch.epoch, in_force=switch.target, target_epoch=switch.epoch)
        )

    def roll_back(self, why: str, now_s: float) -> Iterable[Effect]:
        """A plan of which no copies can be made has cost nobody anything: it may be asked for
        again at once, and goes another way then."""
        stored, failed, course = self.ledger.stored, self.switch, self.course
        assert stored is not None
        assert failed is not None
        assert course is not None
        unplanned = course.planned is not None and bool(course.planned.failure)
        if failed.way == "live":
            # In the middle of another switcher's switch, it may be that switch that stood against.
            for_good = unplanned and not failed.recovered
            self.refusals.failed_live(failed.target.plan_id, why, for_good=for_good)
        if not unplanned:
            self.refusals.failed(failed.target.plan_id, now_s)
        yield Log("switch.rollback", {"epoch": failed.epoch, "reason": why}, "warning")
        back = machine.rollback_of(failed, stored.in_force, epoch=self.next_epoch(), why=why)
        yield from self.begin(back, stored, now_s)

    def reload(self, why: str, now_s: float) -> Iterable[Effect]:
        if self.state == "loading" and self.ledger.writing is None:
            return  # the answer is under way
        self._move("loading", now_s)
        yield Log("plan.reload", {"reason": why}, "warning")
        yield self.ledger.load()

    def progress(self, now_s: float) -> Iterable[Effect]:
        if self.state in machine.WALKING:
            now = self._now(now_s)
            yield announce.switch_progress(now.switch, self.state, now.course, self.view, now_s)

    def next_epoch(self) -> int:
        """Above every epoch ever used, as far as the bucket, the workers and we remember."""
        stored = self.ledger.stored or NOTHING
        used = self.switch.epoch if self.switch else 0
        return max(stored.epoch, stored.target_epoch, used, self.view.epoch_max) + 1

    def prune(self, now_s: float) -> None:
        self._pacing.prune(now_s)

    def plan_in_force(self, now_s: float) -> core.Publish:
        assert self.ledger.stored is not None
        self.published_s = now_s
        return announce.plan_in_force(self.ledger.stored)

    def _settle(self, now_s: float) -> Iterable[Effect]:
        stored, switch, course = self.ledger.stored, self.switch, self.course
        assert stored is not None
        self.switch = self.course = None
        self._move("settled", now_s)
        self._pacing.clear()
        self.view.prune(epoch=stored.epoch, now_s=now_s)
        if switch is not None and course is not None:
            ended = announce.switch_ended(switch, course, now_s)
            if ended.succeeded:
                self.refusals.forget(ended.plan_id)
            yield Log("switch.ended", announce.fields(ended))
            yield subjects.SWITCH_ENDED.send(ended)
        yield self.plan_in_force(now_s)
        yield from self.advance(now_s)

    def _now(self, now_s: float) -> Live:
        assert self.switch is not None, self.state
        assert self.course is not None, self.state
        return Live(
            switch=self.switch,
            course=self.course,
            view=self.view,
            now_s=now_s,
            verify=self._config.verify,
            cache_tokens_min=self._config.cache_tokens_min,
        )

    def _extend(self, now: Live) -> Iterable[Effect]:
        """Each stage has the time of the phase for itself: how many there are is no fault."""
        deadline = self.deadline
        if self.state == "taking" and deadline is not None:
            done = stages_done(now)
            if done > deadline.stage:
                later = PhaseDeadline(epoch=deadline.epoch, state=self.state, stage=done)
                yield self._time(later, now.now_s)

    def _time(self, deadline: PhaseDeadline, now_s: float) -> core.SetTimer:
        self.deadline = deadline
        timeout_s = machine.phase_timeout_s(self.state, self._config)
        return core.SetTimer(now_s + timeout_s, deadline)

    def _move(self, state: State, now_s: float) -> None:
        assert state in machine.MOVES[self.state], (self.state, state)
        self.state, self.waits = state, ""
        if self.course is not None:
            self.course.enter(state, now_s)

    def _send(self, commands: list[Command], now_s: float) -> Iterable[core.Publish]:
        return self._pacing.due(commands, self.view.failures, now_s)
