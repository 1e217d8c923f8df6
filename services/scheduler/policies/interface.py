"""What a policy is told, and what it answers: the contract of every planning policy.

A policy is given all it may know as one frozen ``Problem`` and answers with ``Planned``: a plan,
or None to keep the plan in force, and why, with numbers. It reads no clock and starts nothing:
what it remembers of former problems is its own, and it is asked one problem at a time. A slow one
runs outside the core's step, so it must end by itself within ``Problem.time_limit_s``: nobody can
stop a thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shared.cost.limits import EngineLimits
from shared.mesh import ReplicaWish
from shared.messages.decisions import Decision
from shared.messages.demand import DemandReport, TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.messages.replicas import ReplicaReport
from shared.slo import DEFAULT_TARGETS, SloTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOffer:
    """One GPU that may be planned onto. ``models``: what its worker can serve; empty: anything.
    ``movable``: models whose weights it can take from other workers, and give to them;
    ``cache_bytes``: the KV cache there now, used or not."""

    gpu_id: str
    node_id: str
    kind: str
    models: tuple[str, ...] = ()
    movable: tuple[str, ...] = ()
    cache_bytes: int = 0

    def serves(self, model_id: str) -> bool:
        return not self.models or model_id in self.models


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan, or None when nothing can be placed or nothing should move; and why it is what it
    is. ``dropped`` names replicas asked for that found no room. ``decision``: the figures, of a
    policy that has any. ``unfinished``: it is a step of a longer way, and how to go on is to be
    asked as soon as it is in force."""

    plan: DeploymentPlan | None
    reason: str
    dropped: tuple[str, ...] = ()
    decision: Decision | None = None
    unfinished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemand:
    """What one model is expected to get over the horizon; no types when nothing is expected. Every
    type has a finite rate and input length above 0 and a finite output length of 0 or more: the
    core has sorted out the others."""

    model_id: str
    types: tuple[TypeForecast, ...]
    horizon_s: float = 0.0

    @property
    def arrivals_rps(self) -> float:
        return sum(kind.arrivals_rps for kind in self.types)


@dataclass(frozen=True, slots=True, kw_only=True)
class PastWindow:
    """What arrived in a window of the past, by when it arrived. ``arrivals_rps``: by the number of
    the type."""

    seconds: float
    arrivals_rps: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """``replicas_min``: by model, what it has whatever is expected of it; 1 where it says nothing,
    0: none while nothing is expected. ``survive``: how many replicas may be lost, any, and the rest
    still carry the demand: 0 or 1. ``elastic``: use as few GPUs as the targets allow, the cheapest
    by ``gpu_prices`` (per hour, by kind; 1 where it says nothing)."""

    replicas_min: Mapping[str, int] = field(default_factory=dict[str, int])
    survive: int = 0
    elastic: bool = False
    gpu_prices: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One decision. All mappings by model cover every model of the topology.

    ``models`` are in the topology's order. ``offers`` are sorted by GPU. ``kinds``: the kind of
    every GPU ever known, the vanished included. ``profiles``: the name of a model in the cost
    profiles. ``targets`` are the models', ``class_targets`` those of requests of other SLO classes
    than "standard". ``history``: by model, the windows that are settled, the oldest first.
    ``needs``: what the operator asks of any plan beyond the targets. ``dwell_s``: how long the
    replicas in force have stood unchanged. ``observed``: the newest window of each model that had
    one, and ``loads`` the newest report of each replica in force that sends any: what a reactive
    policy goes by.
    """

    now_s: float
    epoch: int
    models: tuple[ModelDemand, ...]
    offers: tuple[GpuOffer, ...]
    in_force: DeploymentPlan
    wishes: tuple[ReplicaWish, ...] = ()
    kinds: Mapping[str, str]
    profiles: Mapping[str, str]
    targets: Mapping[str, SloTarget]
    limits: EngineLimits
    class_targets: Mapping[str, SloTarget] = field(
        default_factory=lambda: {str(name): target for name, target in DEFAULT_TARGETS.items()}
    )
    history: Mapping[str, tuple[PastWindow, ...]] = field(
        default_factory=dict[str, tuple[PastWindow, ...]]
    )
    needs: Needs = field(default_factory=Needs)
    dwell_s: float = float("inf")
    time_limit_s: float = 30.0
    observed: tuple[DemandReport, ...] = ()
    loads: tuple[ReplicaReport, ...] = ()


class Policy(Protocol):
    @property
    def period_s(self) -> float:
        """Between decisions; 0: each of the scheduler's periods. A GPU that comes or goes brings
        the next one forward."""
        ...

    @property
    def slow(self) -> bool:
        """Whether ``plan`` may take more than a few milliseconds, and so runs as a job."""
        ...

    def plan(self, problem: Problem) -> Planned:
        """The plan for ``problem``. Same problems in the same order, same plans. What it raises is
        logged as the reason, and the plan in force is kept."""
        ...


class StagedPolicy(Policy, Protocol):
    """A policy, and what is done until anything is expected for which it could plan."""

    def start(self, problem: Problem) -> Planned:
        """As ``plan``, but always quick: it is asked within the core's step."""
        ...
