"""The switcher's states, and every legal move between them. Nothing else decides a state.

loading         waits for the KV bucket: at start, and whenever someone else wrote the plan.
settled         the plan in force is what the workers should hold; differences are repaired.
storing_target  the target, its epoch and the way to it go to the bucket, before any worker hears
                of them, so that a switcher started anew walks on under the same epoch and way.

Way "live":
preparing       the copies are planned, and new replicas made ready beside what runs; so are
                replicas that stay and take requests over. Late, failed, or a GPU vanished: roll
                back, nobody has noticed anything.
pausing         leaders that go stand still at a step boundary. Late: roll back, they resume.
taking          weights that did not fit beside the old ones are fetched stage by stage, then new
                leaders take requests and KV cache over. Late, or a stage is: roll back, the old
                ones resume.
committing      the target goes to the bucket as the plan in force. Before it every failure rolls
                back; after it nothing does, and what is late is left to repair.
activating      new replicas go on with the requests that they hold. Late: go on.
retiring        old replicas are stopped on all ranks. Late: go on.

Way "reload":
draining        replicas that change or go finish what they run. Late: they are stopped anyway.
stopping        their GPUs are being freed on all ranks. Late: roll back.
starting        new replicas start on all ranks. Late, failed, or a GPU vanished: roll back.

rolling_back    the plan in force is walked to once more, under a fresh epoch, so that commands
                of the failed switch that are still under way are refused. A rollback has nothing
                to fall back to: when it is late it commits, and repair goes on trying.

A rollback is a switch whose target is the plan in force: it is stored, walked and committed in
the same way, and that is how a switcher started anew in the middle of one knows it.
"""

from dataclasses import dataclass
from typing import Literal

from services.switcher.config import SwitcherConfig
from shared.messages.plans import DeploymentPlan, StoredPlan, SwitchWay

State = Literal[
    "loading",
    "settled",
    "storing_target",
    "preparing",
    "pausing",
    "taking",
    "draining",
    "stopping",
    "starting",
    "committing",
    "activating",
    "retiring",
    "rolling_back",
]

MOVES: dict[State, frozenset[State]] = {
    "loading": frozenset(
        {"loading", "settled", "preparing", "draining", "activating", "rolling_back"}
    ),
    "settled": frozenset({"storing_target", "loading"}),
    "storing_target": frozenset({"preparing", "draining", "rolling_back", "loading"}),
    "preparing": frozenset({"pausing", "storing_target", "loading"}),
    "pausing": frozenset({"taking", "storing_target", "loading"}),
    "taking": frozenset({"committing", "storing_target", "loading"}),
    "draining": frozenset({"stopping", "loading"}),
    "stopping": frozenset({"starting", "storing_target", "loading"}),
    "starting": frozenset({"committing", "storing_target", "loading"}),
    "committing": frozenset({"activating", "settled", "loading"}),
    "activating": frozenset({"retiring", "loading"}),
    "retiring": frozenset({"settled", "loading"}),
    "rolling_back": frozenset({"committing", "loading"}),
}

TOWARDS: frozenset[State] = frozenset(
    {"preparing", "pausing", "taking", "draining", "stopping", "starting", "rolling_back"}
)
"""States in which workers are commanded towards a target that is not in force."""
BEYOND: frozenset[State] = frozenset({"activating", "retiring"})
"""States in which the target is in force, and the last of the switch is being done."""
WALKING: frozenset[State] = TOWARDS | BEYOND
"""States in which workers are commanded, against a deadline."""

GO_ON_LATE: dict[State, State] = {
    "draining": "stopping",
    "activating": "retiring",
    "retiring": "settled",
}
"""Where a walk goes whose phase did not end in time, other than back."""


def phase_timeout_s(state: State, config: SwitcherConfig) -> float:
    """How long the walk may stay in ``state``."""
    return {
        "preparing": config.prepare_timeout_s,
        "pausing": config.pause_timeout_s,
        "taking": config.take_timeout_s,
        "activating": config.activate_timeout_s,
        "retiring": config.retire_timeout_s,
        "draining": config.drain_timeout_s + config.drain_grace_s,
        "stopping": config.stop_timeout_s,
        "starting": config.start_timeout_s,
        "rolling_back": config.stop_timeout_s + config.start_timeout_s,
    }[state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A switch under way, from ``origin``, the plan in force when it began. ``way_why``: why it is
    not live, or live once more. With ``why`` it is the rollback of ``failed``, whose epoch was
    ``failed_epoch``; both are unknown to a switcher started in the middle of it."""

    origin: DeploymentPlan
    target: DeploymentPlan
    epoch: int
    started_s: float
    way: SwitchWay = "reload"
    way_why: str = ""
    recovered: bool = False  # found in the bucket, in the middle of its way
    why: str = ""
    failed: DeploymentPlan | None = None
    failed_epoch: int = 0

    @property
    def rolling_back(self) -> bool:
        return bool(self.why)

    @property
    def first(self) -> State:
        """The state in which its walk begins."""
        if self.rolling_back:
            return "rolling_back"
        return "preparing" if self.way == "live" else "draining"

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
    return Switch(
        origin=stored.in_force,
        target=target,
        epoch=stored.target_epoch,
        started_s=now_s,
        way=stored.way,
        recovered=True,
        why="a rollback was under way when the switcher started" if back else "",
    )


def rollback_of(failed: Switch, in_force: DeploymentPlan, *, epoch: int, why: str) -> Switch:
    return Switch(
        origin=in_force,
        target=in_force,
        epoch=epoch,
        started_s=failed.started_s,
        way=failed.way,
        way_why=failed.way_why,
        why=why,
        failed=failed.target,
        failed_epoch=failed.epoch,
    )
