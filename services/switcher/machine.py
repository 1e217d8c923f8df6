"""The switcher's states, and every legal move between them. Nothing else decides a state.

loading         waits for the KV bucket: at start, and whenever someone else wrote the plan.
settled         the plan in force is what the workers should hold; differences are repaired.
storing_target  the target and its epoch go to the bucket, before any worker hears of them, so
                that a switcher started anew walks on under the same epoch.
draining        replicas that change or go finish what they run. Late: they are stopped anyway.
stopping        their GPUs are being freed on all ranks. Late: roll back.
starting        new replicas start on all ranks. Late, failed, or a GPU vanished: roll back.
committing      the target goes to the bucket as the plan in force.
rolling_back    the plan in force is walked to once more, under a fresh epoch, so that commands
                of the failed switch that are still under way are refused. A rollback has nothing
                to fall back to: when it is late it commits, and repair goes on trying.

A rollback is a switch whose target is the plan in force: it is stored, walked and committed in
the same way, and that is how a switcher started anew in the middle of one knows it.
"""

from dataclasses import dataclass
from typing import Literal

from services.switcher.config import SwitcherConfig
from shared.messages.plans import DeploymentPlan, StoredPlan

State = Literal[
    "loading",
    "settled",
    "storing_target",
    "draining",
    "stopping",
    "starting",
    "committing",
    "rolling_back",
]

MOVES: dict[State, frozenset[State]] = {
    "loading": frozenset({"loading", "settled", "draining", "rolling_back"}),
    "settled": frozenset({"storing_target", "loading"}),
    "storing_target": frozenset({"draining", "rolling_back", "loading"}),
    "draining": frozenset({"stopping", "loading"}),
    "stopping": frozenset({"starting", "storing_target", "loading"}),
    "starting": frozenset({"committing", "storing_target", "loading"}),
    "committing": frozenset({"settled", "loading"}),
    "rolling_back": frozenset({"committing", "loading"}),
}

WALKING: frozenset[State] = frozenset({"draining", "stopping", "starting", "rolling_back"})
"""States in which workers are commanded towards the target, against a deadline."""


def phase_timeout_s(state: State, config: SwitcherConfig) -> float:
    """How long the walk may stay in ``state``."""
    return {
        "draining": config.drain_timeout_s + config.drain_grace_s,
        "stopping": config.stop_timeout_s,
        "starting": config.start_timeout_s,
        "rolling_back": config.stop_timeout_s + config.start_timeout_s,
    }[state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A switch under way. With ``why`` it is the rollback of ``failed``, whose epoch was
    ``failed_epoch``; both are unknown to a switcher started in the middle of it."""

    target: DeploymentPlan
    epoch: int
    started_s: float
    why: str = ""
    failed: DeploymentPlan | None = None
    failed_epoch: int = 0

    @property
    def rolling_back(self) -> bool:
        return bool(self.why)

    def leads_to(self, epoch: int, plan: DeploymentPlan) -> bool:
        """Whether this is the switch to that plan: of two switchers that begin at once, both use
        the same epoch, and the one that lost the race must not walk to its own target."""
        return (self.epoch, self.target) == (epoch, plan)

    @property
    def plan_ids(self) -> tuple[str, ...]:
        """Plans that a repeated wish for is no news of while this switch is under way."""
        return (self.target.plan_id, *((self.failed.plan_id,) if self.failed else ()))


def recovered(stored: StoredPlan, target: DeploymentPlan, now_s: float) -> Switch:
    """The switch that a bucket shows in the middle of its way."""
    back = target.plan_id == stored.in_force.plan_id
    why = "a rollback was under way when the switcher started" if back else ""
    return Switch(target=target, epoch=stored.target_epoch, started_s=now_s, why=why)


def rollback_of(failed: Switch, in_force: DeploymentPlan, *, epoch: int, why: str) -> Switch:
    return Switch(
        target=in_force,
        epoch=epoch,
        started_s=failed.started_s,
        why=why,
        failed=failed.target,
        failed_epoch=failed.epoch,
    )
