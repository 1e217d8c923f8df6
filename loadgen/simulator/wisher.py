"""Whoever wishes for plans in a simulated mesh of switches: it stands for the scheduler.

It wishes for one plan after the other and repeats each until it is in force, as the scheduler does,
but decides nothing: what it wishes for is drawn.
"""

from shared import subjects
from shared.core import Effect, SetTimer, Started
from shared.messages.base import Message
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanInForce

INPUTS = (subjects.PLAN_IN_FORCE,)
REPEAT_S = 0.5


class RepeatTick(Message, frozen=True, kw_only=True):
    """Timer: say it again."""


class Wishes:
    """What is wished for; it outlives the process that says so."""

    def __init__(self, plan: DeploymentPlan) -> None:
        self.plan = plan


class Wisher:
    """A core for the world."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._in_force: PlanInForce | None = None

    @property
    def content(self) -> bool:
        in_force = self._in_force
        return in_force is not None and in_force.plan.plan_id == self._wishes.plan.plan_id

    @property
    def wish(self) -> DeploymentPlan:
        return self._wishes.plan

    def step(self, event: PlanInForce | RepeatTick | Started, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case PlanInForce():
                if self._in_force is None or event.epoch >= self._in_force.epoch:
                    self._in_force = event
            case RepeatTick() | Started():
                effects.append(SetTimer(now_s + REPEAT_S, RepeatTick()))
                if self._in_force is not None and not self.content:
                    adopt = AdoptPlan(plan=self._wishes.plan, based_on_epoch=self._in_force.epoch)
                    effects.append(subjects.ADOPT_PLAN.send(adopt))
        return effects

    def check(self) -> None:
        """It holds no state of its own."""
