"""Which plans are refused, and for how long one that failed: a wish is repeated each second,
and must not drain the same replicas each second."""

from typing import Any

from services.switcher.machine import State
from services.switcher.walk import faults_of
from shared.messages.plans import AdoptPlan, StoredPlan, SwitchWay


class Refusals:
    """Remembers failed plans and what was logged of refused ones; both bounded."""

    PLANS_MAX = 64
    LIVE_MAX = 3  # attempts in a row; then a plan is reloaded

    def __init__(self, base_s: float, base_s_max: float) -> None:
        self._base_s, self._base_s_max = base_s, base_s_max
        self._failures: dict[str, tuple[int, float]] = {}
        self._told: dict[str, str] = {}
        self._live: dict[str, tuple[int, str]] = {}  # failed attempts in a row, the last one's why

    def failed_live(self, plan_id: str, why: str, *, for_good: bool) -> None:
        """``for_good``: there is no way to walk to it live, so that trying again is of no use."""
        count, _ = self._live.pop(plan_id, (0, ""))
        self._live[plan_id] = (self.LIVE_MAX if for_good else count + 1, why)
        _bound(self._live, self.PLANS_MAX)

    def way_to(self, plan_id: str) -> tuple[SwitchWay, str]:
        """The way to this plan as far as it was tried live before, and why."""
        count, why = self._live.get(plan_id, (0, ""))
        if count >= self.LIVE_MAX:
            return "reload", f"live, it failed before: {why}"
        return "live", f"live once more, for it failed: {why}" if count else ""

    def failed(self, plan_id: str, now_s: float) -> None:
        count, _ = self._failures.pop(plan_id, (0, 0.0))
        wait_s = min(self._base_s * 2.0 ** min(count, 16), self._base_s_max)
        self._failures[plan_id] = (count + 1, now_s + wait_s)
        _bound(self._failures, self.PLANS_MAX)

    def forget(self, plan_id: str) -> None:
        self._failures.pop(plan_id, None)
        self._told.pop(plan_id, None)
        self._live.pop(plan_id, None)

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
