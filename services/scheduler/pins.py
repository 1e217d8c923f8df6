"""Plans that a person has asked for, and that the scheduler keeps to until they are released.

The plan itself carries the flag, so that a scheduler started anew keeps to it as well. A release
counts at once; the flag comes off with the next plan. When GPUs vanish, as much of the plan as can
be is placed on what is left, and stays pinned; what comes back is not waited for.
"""

import dataclasses
from collections.abc import Iterable

from services.scheduler.asking import Asking
from services.scheduler.plan_id import make_plan, renamed
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.repair import lost, repair
from services.scheduler.policies.weights import equal
from shared.core import Effect, Log, Query, Reply
from shared.messages.plans import DeploymentPlan, PinAnswer, PinPlan, ReleasePlan

TOO_EARLY = "what is in force, or which workers there are, is not known yet: ask again"


class Pins:
    def __init__(self, asking: Asking) -> None:
        self._asking, self._wish, self._standing = asking, asking.wish, asking.standing
        self._released = False  # flags count no more, whichever plan still comes with one

    @property
    def plan(self) -> DeploymentPlan | None:
        """The pinned plan to keep to: what is wished for, else what is in force, if it is one."""
        plans = () if self._released else (self._wish.plan, self._standing.plan)
        return next((plan for plan in plans if plan and plan.pinned), None)

    def keep_to(self, plan: DeploymentPlan, problem: Problem) -> Iterable[Effect]:
        """``plan``, as long as there are GPUs for it; else as much of it as there is room for."""
        if gone := lost(plan, problem):
            why = f"pinned, and GPUs of {', '.join(gone)} are gone"
            repaired = repair(dataclasses.replace(problem, in_force=plan), why=why)
            if repaired.plan is None:
                yield from self._asking.keep(f"{why}: nothing can be placed", problem.now_s)
                return
            pinned = renamed(repaired.plan, pinned=True)
            planned = dataclasses.replace(repaired, plan=pinned)
            yield from self._asking.ask(planned, problem, pinned.weights)
        elif plan is self._wish.plan:
            yield from self._wish.repeat(self._standing.epoch)
        else:
            why = f"pinned: {plan.plan_id} stays until it is released"
            yield from self._asking.keep(why, problem.now_s)

    def answer(self, query: Query, problem: Problem | None) -> Iterable[Effect]:
        """``problem`` is None before the core decides. A repeated question finds its wish granted,
        or on its way, and changes nothing."""
        match query.message:
            case PinPlan() as asked if problem is not None:
                yield from self._on_pin(asked, problem, query.reply_to)
            case ReleasePlan() if problem is not None:
                yield from self._on_release(problem, query.reply_to)
            case PinPlan() | ReleasePlan():
                yield self._reply(query.reply_to, wrong=(TOO_EARLY,))
            case _:
                fields = {"message_type": type(query.message).__name__}
                yield Log("scheduler.question_unknown", fields, "warning")

    def _on_pin(self, asked: PinPlan, problem: Problem, reply_to: str) -> Iterable[Effect]:
        plan = _pinned(asked.plan)
        kept = self.plan
        if kept is None or kept.plan_id != plan.plan_id:
            wrong = tuple(self._asking.faults(plan, problem))
            if wrong:
                yield Log("plan.pin_refused", {"plan_id": plan.plan_id, "wrong": wrong}, "warning")
                yield self._reply(reply_to, wrong=wrong)
                return
            yield Log("plan.pinned", {"plan_id": plan.plan_id})
            self._released = False
            in_force = self._standing.plan
            if in_force is not None and in_force.plan_id == plan.plan_id:
                self._wish.withdraw()  # it was released a moment ago, and is pinned once more
            else:
                planned = Planned(plan=plan, reason=plan.reason)
                yield from self._asking.ask(planned, problem, plan.weights)
        yield self._reply(reply_to, plan_id=plan.plan_id)

    def _on_release(self, problem: Problem, reply_to: str) -> Iterable[Effect]:
        in_force, kept = self._standing.plan, self.plan
        self._released = True
        if kept is not None:
            yield Log("plan.released", {"plan_id": kept.plan_id})
            self._wish.withdraw()
            planned = Planned(plan=problem.in_force, reason="released: plans are made again")
            if in_force and in_force.pinned and not lost(in_force, problem):
                yield from self._asking.settle(planned, problem)
        yield self._reply(reply_to, plan_id=in_force.plan_id if in_force else "")

    def _reply(self, to: str, *, plan_id: str = "", wrong: tuple[str, ...] = ()) -> Reply:
        return Reply(to, PinAnswer(plan_id=plan_id, epoch=self._standing.epoch, wrong=wrong))


def _pinned(asked: DeploymentPlan) -> DeploymentPlan:
    """The plan as it is to be put in force; without any weights, with equal ones."""
    weights = asked.weights or equal(asked.replicas)
    return make_plan(asked.replicas, weights, reason="adopted by hand", pinned=True)
