"""The fast loop: between two decisions it shifts routing weights, and nothing else, to where the
replicas in force can bear more (``correction.py``)."""

from collections.abc import Sequence

from services.scheduler.correction import (
    CHANGE_MIN,
    Bias,
    advanced,
    corrected,
)
from services.scheduler.correction_size import largest_move
from services.scheduler.plan_id import renamed
from services.scheduler.policies.interface import Planned
from services.scheduler.standing import Standing
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import ReplicaReport


class Balance:
    """Proposes at most every ``period_s``; 0: never."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._bias = Bias()
        self._replicas: tuple[ReplicaSpec, ...] = ()  # of which it was learnt
        self._seen_s: float | None = None
        self._tried_s = float("-inf")

    def rest(self) -> None:
        """Nothing is to be corrected now: forget what was learnt."""
        self._bias, self._seen_s = Bias(), None

    def look(self, standing: Standing, loads: Sequence[ReplicaReport], now_s: float) -> None:
        """Learn from what the replicas in force bear now."""
        if self._period_s > 0.0:
            seconds = 0.0 if self._seen_s is None else max(0.0, now_s - self._seen_s)
            self._seen_s = now_s
            self._bias = advanced(
                self._known_of(standing.replicas),
                standing.replicas,
                standing.weights,
                loads,
                seconds=seconds,
            )
            self._replicas = standing.replicas

    def applied(self, plan: DeploymentPlan) -> DeploymentPlan:
        """``plan`` with its weights corrected by what is known of the replicas that it keeps."""
        weights = corrected(plan.weights, plan.replicas, self._known_of(plan.replicas))
        return renamed(plan, weights=weights, pinned=plan.pinned)

    def proposal(
        self, standing: Standing, loads: Sequence[ReplicaReport], now_s: float
    ) -> Planned | None:
        """The plan in force with other weights, if these differ by enough, or are once more those
        that were decided; and it is time."""
        in_force = standing.plan
        if in_force is None or self._period_s <= 0.0 or now_s - self._tried_s < self._period_s:
            return None
        if self._bias.even and in_force.weights == standing.weights:
            return None
        self._tried_s = now_s
        plan = self.applied(standing.as_decided())
        move = largest_move(in_force.weights, plan.weights, standing.replicas)
        even = plan.weights == standing.weights
        if move.size <= CHANGE_MIN and not (even and move.size > 0.0):
            return None
        load = {report.replica_id: report for report in loads}.get(move.replica_id)
        where = f", where {load.waiting} wait behind {load.running} that run" if load else ""
        why = "replicas are even, weights as they were decided" if even else "weights corrected"
        share = f"{move.after:.2f} instead of {move.before:.2f}"
        return Planned(plan=plan, reason=f"{why}: {share} to {move.replica_id}{where}")

    def _known_of(self, replicas: Sequence[ReplicaSpec]) -> Bias:
        """Of those that stay as they are: an id may come back elsewhere."""
        if replicas == self._replicas:
            return self._bias
        learnt = set(self._replicas)
        return self._bias.of({spec.replica_id for spec in replicas if spec in learnt})
