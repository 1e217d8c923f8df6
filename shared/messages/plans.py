"""The deployment plan: replicas and routing weights in one object, and its way into force."""

from typing import Literal

import msgspec

from shared.messages.base import Message
from shared.messages.decisions import Decision


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One copy of a model at one parallelism, on named GPUs (one worker each; the first leads)."""

    replica_id: str
    model_id: str
    parallelism: str
    gpus: tuple[str, ...]


class DeploymentPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Replicas, and per request type the share of its requests that each replica gets.

    ``weights[type][replica_id]``; type "*" holds for every type without a row of its own. Rows
    sum to 1. ``plan_id`` is a digest of the contents. ``pinned``: a person asked for it, and the
    scheduler keeps to it until released.
    """

    plan_id: str
    replicas: tuple[ReplicaSpec, ...] = ()
    weights: dict[str, dict[str, float]] = msgspec.field(
        default_factory=dict[str, dict[str, float]]
    )
    reason: str = ""
    pinned: bool = False


SwitchWay = Literal["live", "reload"]
"""live: new replicas are made ready beside the old ones and take over weights, requests and KV
cache. reload: the old ones drain and stop, the new ones load from disk."""


class StoredPlan(Message, frozen=True, kw_only=True):
    """What the KV bucket holds: the plan in force, and the target while a switch is under way."""

    epoch: int
    in_force: DeploymentPlan
    target: DeploymentPlan | None = None
    target_epoch: int = 0
    way: SwitchWay = "reload"


class AdoptPlan(Message, frozen=True, kw_only=True):
    """The scheduler's wish, republished each period until in force. ``based_on_epoch`` is the
    plan in force that it was computed against; the switcher refuses it when that has passed."""

    plan: DeploymentPlan
    based_on_epoch: int


class PlanInForce(Message, frozen=True, kw_only=True):
    """What serves now. Republished each second by the switcher; routers follow it."""

    epoch: int
    plan: DeploymentPlan
    switching_to: str = ""  # plan_id of the target while a switch is under way


class PlanProposed(Message, frozen=True, kw_only=True):
    """The scheduler decided to move, with its reason."""

    plan: DeploymentPlan
    based_on_epoch: int
    reason: str
    decision: Decision | None = None


class PlanKept(Message, frozen=True, kw_only=True):
    """The scheduler decided not to move, with its reason (published when the reason changes)."""

    epoch: int
    reason: str
    decision: Decision | None = None


class PinPlan(Message, frozen=True, kw_only=True):
    """A person's wish: put ``plan`` in force and keep to it. Its id and reason are the scheduler's
    to give."""

    plan: DeploymentPlan


class ReleasePlan(Message, frozen=True, kw_only=True):
    """A person's wish: keep to the pinned plan no more, plan again."""


class PinAnswer(Message, frozen=True, kw_only=True):
    """What the scheduler says to either. ``wrong``: why it was refused, empty when it was not."""

    plan_id: str = ""
    epoch: int = 0
    wrong: tuple[str, ...] = ()


class SwitchStarted(Message, frozen=True, kw_only=True):
    epoch: int
    plan_id: str
    replicas_stopping: tuple[str, ...] = ()
    replicas_starting: tuple[str, ...] = ()
    way: SwitchWay = "reload"
    why: str = ""  # why it is not live, or live once more


class SwitchProgress(Message, frozen=True, kw_only=True):
    """How far the switch under way is; repeated while it is. ``bytes_done`` of ``bytes_total``."""

    epoch: int
    plan_id: str
    phase: str
    bytes_done: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0


class SwitchReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a switch did. ``bytes_by_link``: "<source>><target>" of workers ("disk" as a source),
    weights and KV cache; what stayed in place is left out. ``bytes_bound``: the least that any
    plan of copies would have moved so, the KV cache that moved counted once. ``pause_*_s``: over
    requests taken over, from their last step before to the start of the replica that goes on with
    them."""

    way: SwitchWay = "reload"
    bytes_by_link: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    bytes_bound: int = 0
    bytes_in_place: int = 0
    cache_bytes: int = 0
    cache_ahead_bytes: int = 0
    phase_s: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    moved: int = 0
    replayed: int = 0
    pause_p50_s: float = 0.0
    pause_p99_s: float = 0.0
    stages: int = 1
    notes: tuple[str, ...] = ()


class SwitchEnded(Message, frozen=True, kw_only=True):
    """The target is in force, or the switch was rolled back; ``detail`` says why."""

    epoch: int
    plan_id: str
    succeeded: bool
    took_s: float
    detail: str = ""
    report: SwitchReport | None = None
