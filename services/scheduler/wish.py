"""The plan that the scheduler asks for, and how it tells of it and of why it asks for none."""

import re
from collections.abc import Iterable

import msgspec

from services.scheduler.policies.interface import Planned
from shared import subjects
from shared.core import Effect, Log
from shared.messages.decisions import Decision
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanKept, PlanProposed, ReplicaSpec

_NUMBERS = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


class Wish:
    """``plan``: last proposed and not yet in force. It was computed against replicas in force:
    while these stand, it holds under any epoch, since weights may be corrected meanwhile."""

    def __init__(self, *, keep_period_s: float = 0.0) -> None:
        """``keep_period_s``: between two words of why nothing moves that differ in numbers."""
        self._keep_period_s = keep_period_s
        self.plan: DeploymentPlan | None = None
        self._against: tuple[tuple[ReplicaSpec, ...], ...] = ()
        self._said = ""  # last decision told
        self._said_s = float("-inf")

    def check(self) -> None:
        """Assert that what is asked for can be a plan at all."""
        if self.plan is not None:
            assert self.plan.replicas, "never wish for an empty plan"
            gpus = [gpu for spec in self.plan.replicas for gpu in spec.gpus]
            assert len(gpus) == len(set(gpus)), gpus
            for row in self.plan.weights.values():
                assert abs(sum(row.values()) - 1.0) < 1e-9, row  # noqa: PLR2004  # rounding

    @property
    def told(self) -> bool:
        """Whether the last decision was to keep the plan in force."""
        return self.plan is None and bool(self._said)

    def orphaned(self, in_force: DeploymentPlan | None) -> bool:
        """Whether the plan was computed against replicas that are in force no more."""
        if self.plan is None or in_force is None:
            return False
        return in_force.replicas not in self._against

    def came_true(self, plan_id: str) -> None:
        if self.plan is not None and self.plan.plan_id == plan_id:
            self.plan = None

    def withdraw(self) -> None:
        """Ask for it no more."""
        self.plan = None

    def repeat(self, epoch: int) -> Iterable[Effect]:
        """``epoch``: in force now."""
        if self.plan is not None:
            yield subjects.ADOPT_PLAN.send(AdoptPlan(plan=self.plan, based_on_epoch=epoch))

    def ask(
        self,
        planned: Planned,
        *,
        epoch: int,
        against: tuple[tuple[ReplicaSpec, ...], ...],
        workers: int,
        expected_rps: float | None,
    ) -> Iterable[Effect]:
        """Wish for the plan; tell of it if it is a new one. ``against``: the replicas in force for
        which it holds."""
        plan, self._against = planned.plan, against
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
                    "pinned": plan.pinned,
                    "dropped": planned.dropped,
                    "workers": workers,
                    "expected_rps": expected_rps,
                    "reason": reason,
                },
            )
            yield subjects.PLAN_PROPOSED.send(
                PlanProposed(
                    plan=self.plan,
                    based_on_epoch=epoch,
                    reason=reason,
                    decision=planned.decision,
                )
            )
        yield from self.repeat(epoch)

    def keep(
        self,
        why: str,
        *,
        now_s: float,
        epoch: int,
        expected_rps: float | None,
        decision: Decision | None = None,
    ) -> Iterable[Effect]:
        """Wish for nothing; tell why if that is news: at once when it is of another kind, else
        when the last word is a while ago."""
        self.plan = None
        same_kind = _NUMBERS.sub("#", why) == _NUMBERS.sub("#", self._said)
        if why == self._said or (same_kind and now_s - self._said_s < self._keep_period_s):
            return
        self._said, self._said_s = why, now_s
        reason = f"{why}; {_in_words(expected_rps)}"
        yield Log("plan.kept", {"epoch": epoch, "expected_rps": expected_rps, "reason": reason})
        yield subjects.PLAN_KEPT.send(PlanKept(epoch=epoch, reason=reason, decision=decision))


def _in_words(expected_rps: float | None) -> str:
    return "no forecast yet" if expected_rps is None else f"{expected_rps:g} requests/s expected"
