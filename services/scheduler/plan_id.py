"""A plan's name is a digest of what it does, so that equal plans are known to be equal."""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from shared.messages.plans import DeploymentPlan, ReplicaSpec

_encoder = msgspec.json.Encoder(order="deterministic")


def make_plan(
    replicas: Iterable[ReplicaSpec],
    weights: Mapping[str, Mapping[str, float]],
    *,
    reason: str,
    pinned: bool = False,
) -> DeploymentPlan:
    """A plan with sorted replicas and rows; ``reason`` is no part of its name."""
    ordered = tuple(sorted(replicas, key=lambda spec: spec.replica_id))
    rows = {kind: dict(sorted(row.items())) for kind, row in sorted(weights.items())}
    contents = (ordered, rows, "pinned") if pinned else (ordered, rows)
    digest = hashlib.sha256(_encoder.encode(contents)).hexdigest()
    return DeploymentPlan(
        plan_id=f"plan-{digest[:12]}",
        replicas=ordered,
        weights=rows,
        reason=reason,
        pinned=pinned,
    )


def renamed(
    plan: DeploymentPlan,
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    reason: str | None = None,
    pinned: bool = False,
) -> DeploymentPlan:
    """``plan`` with other weights, reason or flag, under the name that goes with them; itself if
    it is that already."""
    rows = plan.weights if weights is None else weights
    if rows == plan.weights and pinned == plan.pinned:
        return plan if reason is None else msgspec.structs.replace(plan, reason=reason)
    words = plan.reason if reason is None else reason
    return make_plan(plan.replicas, rows, reason=words, pinned=pinned)
