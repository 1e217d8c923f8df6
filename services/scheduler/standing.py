"""The plan in force as the scheduler knows it: under which epoch, since when, and as decided by
whom. Weights that were corrected since are told apart from those that were decided."""

from collections.abc import Mapping

from services.scheduler.correction import Weights
from services.scheduler.plan_id import renamed
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec, StoredPlan

SILENCES_MAX = 5
"""Periods without word of the epoch we believe in, after which a lower one is believed: the
state bucket was emptied and epochs began anew."""
DECIDED_MAX = 8  # plans asked for whose decided weights are remembered


class Standing:
    def __init__(self, *, period_s: float) -> None:
        self._silence_s_max = SILENCES_MAX * period_s
        self.plan: DeploymentPlan | None = None
        self.epoch = 0
        self._heard_s = 0.0  # when the switcher last confirmed ``epoch``
        self._since_s = 0.0
        self._weights: Weights = {}
        self._as_decided: DeploymentPlan | None = None
        self.leaders: frozenset[tuple[str, str]] = frozenset()
        """Replica and leading worker of each replica."""
        self.inherited = False
        """Whether a plan was in force before this scheduler said anything."""
        self._decided: dict[str, Weights] = {}

    def begin(self, now_s: float) -> None:
        self._heard_s = now_s

    def hear(self, event: PlanInForce, now_s: float) -> bool:
        """Take it in; whether it is believed."""
        silent_s = now_s - self._heard_s
        if event.epoch < self.epoch and silent_s <= self._silence_s_max:
            return False
        self._set(event.epoch, event.plan, now_s)
        return True

    def recover(self, stored: StoredPlan, now_s: float) -> bool:
        if stored.epoch < self.epoch:
            return False
        self._set(stored.epoch, stored.in_force, now_s)
        self.inherited = bool(stored.in_force.replicas)
        return True

    def asked_for(self, plan: DeploymentPlan, decided: Weights) -> None:
        """``plan`` may come into force; its weights are a correction of ``decided``."""
        self._decided.pop(plan.plan_id, None)
        self._decided[plan.plan_id] = decided
        while len(self._decided) > DECIDED_MAX:
            del self._decided[next(iter(self._decided))]

    @property
    def replicas(self) -> tuple[ReplicaSpec, ...]:
        return self.plan.replicas if self.plan else ()

    @property
    def models(self) -> set[str]:
        return {spec.model_id for spec in self.replicas}

    @property
    def weights(self) -> Weights:
        """As they were decided, before any correction."""
        return self._weights

    def as_decided(self) -> DeploymentPlan:
        """The plan in force as a policy made it: without corrections, and without a pin."""
        assert self._as_decided is not None
        return self._as_decided

    def dwell_s(self, now_s: float) -> float:
        """How long its replicas have stood unchanged, as far as known: at least that long."""
        return now_s - self._since_s

    def _set(self, epoch: int, plan: DeploymentPlan, now_s: float) -> None:
        former = self.plan
        if former is None or former.replicas != plan.replicas:
            self._since_s = now_s
        if former is None or former.plan_id != plan.plan_id:
            unknown: Mapping[str, Mapping[str, float]] = plan.weights
            self._weights = self._decided.get(plan.plan_id, unknown)
            self._as_decided = renamed(plan, weights=self._weights)
            leaders = ((spec.replica_id, spec.gpus[0]) for spec in plan.replicas if spec.gpus)
            self.leaders = frozenset(leaders)
        self.epoch, self.plan, self._heard_s = epoch, plan, now_s
