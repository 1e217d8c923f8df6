"""What is answered to one question for a plan."""

from typing import Literal

import msgspec

from shared.messages.decisions import Decision
from shared.messages.plans import DeploymentPlan
from shared.slo import SloTarget

Change = Literal["new", "none", "weights", "replicas"]
"""What a plan changes of the one in force: all, where nothing is; nothing; weights alone; or which
replicas there are."""


class TypeName(msgspec.Struct, frozen=True, kw_only=True):
    """What the type ``request_type`` of a model is called in the demand."""

    model_id: str
    request_type: str
    name: str


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """n[shape, type]: what one replica serves within its targets if it sees this type alone."""

    model_id: str
    gpu_kind: str
    parallelism: str
    request_type: str
    requests_per_s: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, and what the policy said.

    ``gpus`` and ``demand`` are words; ``horizon_s`` is for how long the demand is taken to last.
    ``targets``: by SLO class, of those expected, and by model where one has its own. ``survive``:
    how many replicas the plan is made to lose; ``priced``: whether the operator set prices, else an
    elastic plan counts GPUs. ``plan`` is None when nothing can be placed; ``brief`` are its
    replicas, such as ``2 x tp4``, ``shapes`` those in use by kind of GPU, ``price_per_hour`` is of
    the GPUs that it uses. ``change``: from the plan in force. ``missing``: what cannot be served,
    and what it would take; empty when the plan carries the demand.
    """

    topology: str
    gpus: str
    demand: str
    horizon_s: float
    notes: tuple[str, ...]
    price_per_hour: float
    targets: dict[str, SloTarget]
    arrivals_rps: float
    types: tuple[TypeName, ...]
    survive: int
    priced: bool
    plan: DeploymentPlan | None
    brief: str
    shapes: tuple[tuple[str, str], ...]
    decision: Decision
    reason: str
    change: Change
    missing: tuple[str, ...]
    took_s: float

    @property
    def feasible(self) -> bool:
        return not self.missing

    def type_name(self, model_id: str, number: str) -> str:
        """The name of a type, its number where it has none."""
        for kind in self.types:
            if (kind.model_id, kind.request_type) == (model_id, number):
                return kind.name
        return number
