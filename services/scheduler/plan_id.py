"""A plan's name is a digest of what it does, so that equal plans are known to be equal."""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from shared.messages.plans import DeploymentPlan, ReplicaSpec

_encoder = msgspec.json.Encoder(order="deterministic")


def make_plan(
    replicas: Iterable[ReplicaSpec], weights: Mapping[str, Mapping[str, float]], *, reason: str
) -> DeploymentPlan:
    """A plan with sorted replicas and rows; ``reason`` is no part of its name."""
    ordered = tuple(sorted(replicas, key=lambda spec: spec.replica_id))
    rows = {kind: dict(sorted(row.items())) for kind, row in sorted(weights.items())}
    digest = hashlib.sha256(_encoder.encode((ordered, rows))).hexdigest()
    return DeploymentPlan(
        plan_id=f"plan-{digest[:12]}", replicas=ordered, weights=rows, reason=reason
    )
