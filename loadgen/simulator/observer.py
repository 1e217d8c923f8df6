"""Listens to the mesh and keeps what a report needs: changes of plan, and who held which GPUs."""

from collections import Counter

from loadgen.simulator.outcome import Switch
from shared import subjects
from shared.core import Effect, Started
from shared.messages.plans import (
    DeploymentPlan,
    PlanInForce,
    PlanProposed,
    SwitchEnded,
)

INPUTS = (
    subjects.PLAN_IN_FORCE,
    subjects.PLAN_PROPOSED,
    subjects.SWITCH_ENDED,
)
PROPOSALS_MAX = 64


class Observer:
    """A core for the world."""

    def __init__(self) -> None:
        self.switches: list[Switch] = []
        self.gpu_seconds = 0.0
        self.epoch = -1
        self.in_force: DeploymentPlan | None = None
        self._before: DeploymentPlan | None = None  # in force before that
        self._since_s = 0.0
        self._proposed: dict[str, DeploymentPlan] = {}

    def step(
        self,
        event: PlanInForce | PlanProposed | SwitchEnded | Started,
        now_s: float,
    ) -> list[Effect]:
        match event:
            case PlanInForce():
                if event.epoch != self.epoch:
                    self.account(now_s)
                    self._before = self.in_force
                    self.epoch, self.in_force = event.epoch, event.plan
            case PlanProposed():
                self._proposed[event.plan.plan_id] = event.plan
                while len(self._proposed) > PROPOSALS_MAX:
                    del self._proposed[next(iter(self._proposed))]
            case SwitchEnded():
                self._on_ended(event, now_s)
            case Started():
                pass
        return []

    def check(self) -> None:
        assert len(self._proposed) <= PROPOSALS_MAX

    def account(self, now_s: float) -> None:
        """Charge the plan in force until now."""
        if self.in_force is not None:
            gpus = sum(len(spec.gpus) for spec in self.in_force.replicas)
            self.gpu_seconds += gpus * (now_s - self._since_s)
        self._since_s = now_s

    def begin(self, now_s: float) -> None:
        """What is reported begins now: how the first plan came up is no part of it."""
        self.account(now_s)
        self.gpu_seconds = 0.0
        self.switches.clear()

    def _on_ended(self, ended: SwitchEnded, now_s: float) -> None:
        plan = self._proposed.get(ended.plan_id)
        # It is told before the plan that it has put in force, or, of a live one, after it.
        before = self._before if ended.epoch == self.epoch else self.in_force
        kept = plan is not None and before is not None and plan.replicas == before.replicas
        self.switches.append(
            Switch(
                at_s=now_s - ended.took_s,
                took_s=ended.took_s,
                succeeded=ended.succeeded,
                plan=words(plan) if plan is not None else ended.plan_id,
                reason=ended.detail or (plan.reason if plan is not None else ""),
                moved=not kept,
            )
        )


def words(plan: DeploymentPlan) -> str:
    """The shapes of a plan: ``2 tp4pp1, 4 tp2pp1``, by model where there are several."""
    several = len({spec.model_id for spec in plan.replicas}) > 1
    counts = Counter(
        (spec.model_id if several else "", spec.parallelism.removesuffix("pp1"))
        for spec in plan.replicas
    )
    return ", ".join(
        f"{count} {model_id + ' ' if model_id else ''}{shape}"
        for (model_id, shape), count in sorted(counts.items())
    )
