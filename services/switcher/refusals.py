"""Which plans are refused, and for how long one that failed: a wish is repeated each second,
and must not drain the same replicas each second."""

from typing import Any

from services.switcher.machine import State
from services.switcher.walk import faults_of
from shared.messages.plans import AdoptPlan, StoredPlan


class Refusals:
    """Remembers failed plans and what was logged of refused ones; both bounded."""

    PLANS_MAX = 64

    def __init__(self, base_s: float, base_s_max: float) -> None:
        self._base_s, self._base_s_max = base_s, base_s_max
        self._failures: dict[str, tuple[int, float]] = {}
        self._told: dict[str, str] = {}
        self._not_live: dict[str, str] = {}

    def failed_live(self, plan_id: str, why: str) -> None:
        """Whoever asks for it again gets it another way."""
        self._not_live.pop(plan_id, None)
        self._not_live[plan_id] = f"live, it failed before: {why}"
        _bound(self._not_live, self.PLANS_MAX)

    def not_live(self, plan_id: str) -> str:
        """Why this plan is not walked to live; "" if it is."""
        return self._not_live.get(plan_id, "")

    def failed(self, plan_id: str, now_s: float) -> None:
        count, _ = self._failures.pop(plan_id, (0, 0.0))
        wait_s = min(self._base_s * 2.0 ** min(count, 16), self._base_s_max)
        self._failures[plan_id] = (count + 1, now_s + wait_s)
        _bound(self._failures, self.PLANS_MAX)

    def forget(self, plan_id: str) -> None:
        self._failures.pop(plan_id, None)
        self._told.pop(plan_id, None)
        self._not_live.pop(plan_id, None)

    def wait_s(self, plan_id: str, now_s: float) -> float:
        _, until_s = self._failures.get(plan_id, (0, 0.0))
        return max(0.0, until_s - now_s)

    def refusal(self, event: AdoptPlan, state: State, stored: StoredPlan, now_s: float) -> str:
        """Why this plan is not adopted now; "" if it is."""
        if state != "settled":
            return f"a switch is under way ({state})"
        if event.based_on_epoch != stored.epoch:
            return f"based on epoch {event.based_on_epoch}, in force is {stored.epoch}"
        if faults := faults_of(event.plan):
            return f"invalid: {faults}"
        if (wait_s := self.wait_s(event.plan.plan_id, now_s)) > 0:
            return f"it failed before and is refused for {wait_s:.0f} s"
        return ""

    def is_new(self, plan_id: str, refusal: str) -> bool:
        """Whether this refusal of this plan has not been told yet; times in it do not count."""
        kind = refusal.partition(" is refused for ")[0]
        if self._told.get(plan_id) == kind:
            return False
        self._told.pop(plan_id, None)
        self._told[plan_id] = kind
        _bound(self._told, self.PLANS_MAX)
        return True


def _bound(memory: dict[str, Any], size: int) -> None:
    """Drop the oldest: dicts keep the order of insertion."""
    while len(memory) > size:
        del memory[next(iter(memory))]
