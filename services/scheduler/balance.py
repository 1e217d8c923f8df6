"""The fast loop: between two decisions it shifts routing weights, and nothing else, to where the
replicas in force can bear more (``correction.py``)."""

from collections.abc import Sequence

from services.scheduler.correction import (
    CHANGE_MIN,
    Bias,
    advanced,
    change,
    corrected,
)
from services.scheduler.plan_id import renamed
from services.scheduler.policies.interface import Planned
from services.scheduler.standing import Standing
from shared.messages.plans import DeploymentPlan
from shared.messages.replicas import ReplicaReport


class Balance:
    """Proposes at most every ``period_s``; 0: never."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._bias = Bias()
        self._seen_s: float | None = None
        self._proposed_s = float("-inf")

    def rest(self) -> None:
        """Nothing is to be corrected now: forget what was learnt."""
        self._bias, self._seen_s = Bias(), None

    def look(self, standing: Standing, loads: Sequence[ReplicaReport], now_s: float) -> None:
        """Learn from what the replicas in force bear now."""
        if self._period_s > 0.0:
            seconds = 0.0 if self._seen_s is None else max(0.0, now_s - self._seen_s)
            self._seen_s = now_s
            self._bias = advanced(
                self._bias, standing.replicas, standing.weights, loads, seconds=seconds
            )

    def applied(self, plan: DeploymentPlan) -> DeploymentPlan:
        """``plan`` with its weights corrected by what is known of the replicas that it keeps."""
        weights = corrected(plan.weights, plan.replicas, self._bias)
        return renamed(plan, weights=weights, pinned=plan.pinned)

    def proposal(
        self, standing: Standing, loads: Sequence[ReplicaReport], now_s: float
    ) -> Planned | None:
        """The plan in force with other weights, if these differ by enough, or are once more those
        that were decided; and it is time."""
        in_force = standing.plan
        if in_force is None or self._period_s <= 0.0 or now_s - self._proposed_s < self._period_s:
            return None
        plan = self.applied(standing.as_decided())
        largest, where = change(in_force.weights, plan.weights, standing.replicas)
        even = plan.weights == standing.weights
        if largest <= CHANGE_MIN and not (even and largest > 0.0):
            return None
        self._proposed_s = now_s
        load = {report.replica_id: report for report in loads}.get(where)
        words = f", where {load.waiting} wait behind {load.running} that run" if load else ""
        why = "replicas are even: weights as they were decided" if even else "weights corrected"
        return Planned(plan=plan, reason=f"{why}: {largest:.0%} of requests at {where}{words}")
