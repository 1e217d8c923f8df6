"""The plan that the scheduler asks for, and how it tells of it and of why it asks for none."""

from collections.abc import Iterable

import msgspec

from services.scheduler.policies.interface import Planned
from shared import subjects
from shared.core import Effect, Log
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanKept, PlanProposed


class Wish:
    """``plan``: last proposed and not yet in force; ``epoch``: the plan in force that it was
    computed against."""

    def __init__(self) -> None:
        self.plan: DeploymentPlan | None = None
        self.epoch = 0
        self._said = ""  # last decision told, without its numbers

    @property
    def told(self) -> bool:
        """Whether the last decision was to keep the plan in force."""
        return self.plan is None and bool(self._said)

    def orphaned(self, epoch: int) -> bool:
        """Whether the plan was computed against one that is in force no more: it would be
        refused."""
        return self.plan is not None and self.epoch != epoch

    def came_true(self, plan_id: str) -> None:
        if self.plan is not None and self.plan.plan_id == plan_id:
            self.plan = None

    def repeat(self) -> Iterable[Effect]:
        if self.plan is not None:
            yield subjects.ADOPT_PLAN.send(AdoptPlan(plan=self.plan, based_on_epoch=self.epoch))

    def ask(
        self, planned: Planned, *, epoch: int, workers: int, expected_rps: float | None
    ) -> Iterable[Effect]:
        """Wish for the plan; tell of it if it is a new one."""
        plan, self.epoch = planned.plan, epoch
        assert plan is not None
        if self.plan is None or self.plan.plan_id != plan.plan_id:
            reason = f"{planned.reason}; {_in_words(expected_rps)}"
            self.plan = msgspec.structs.replace(plan, reason=reason)
            self._said = ""
            yield Log(
                "plan.proposed",
                {
                    "plan_id": plan.plan_id,
                    "based_on_epoch": epoch,
                    "replicas": len(plan.replicas),
                    "dropped": planned.dropped,
                    "workers": workers,
                    "expected_rps": expected_rps,
                    "reason": reason,
                },
            )
            yield subjects.PLAN_PROPOSED.send(
                PlanProposed(plan=self.plan, based_on_epoch=epoch, reason=reason)
            )
        yield from self.repeat()

    def keep(self, why: str, *, epoch: int, expected_rps: float | None) -> Iterable[Effect]:
        """Wish for nothing; tell why if that is news."""
        self.plan = None
        if why == self._said:
            return
        self._said = why
        reason = f"{why}; {_in_words(expected_rps)}"
        yield Log("plan.kept", {"epoch": epoch, "expected_rps": expected_rps, "reason": reason})
        yield subjects.PLAN_KEPT.send(PlanKept(epoch=epoch, reason=reason))


def _in_words(expected_rps: float | None) -> str:
    return "no forecast yet" if expected_rps is None else f"{expected_rps:g} requests/s expected"
