"""Routing weights of a plan: every row sums to 1, also when several models share it.

Types are numbered per model, so a row "3" may belong to several. A router looks at its model's
replicas alone and goes by their weights relative to each other; it mixes rows by the chances of a
request's types, so a model's weights must sum to the same in every row.
"""

from collections import Counter
from collections.abc import Mapping

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import Planned
from shared.messages.plans import DeploymentPlan, ReplicaSpec

ANY_TYPE = "*"
DIGITS = 6
"""Weights are rounded so that a solver's noise makes no new plan."""

Rows = Mapping[str, Mapping[str, float]]
"""``rows[type][replica_id]``: shares above zero of one model's replicas, to any scale."""


def joined(rows: Mapping[str, Rows]) -> dict[str, dict[str, float]]:
    """The plan's weights from ``rows`` by model. A model without a row for "*" gets the mean of its
    rows there; where another model has a row that it lacks, its "*" row stands in."""
    models = {model_id: _with_any(own) for model_id, own in rows.items()}
    models = {model_id: own for model_id, own in models.items() if own}
    names = sorted({name for own in models.values() for name in own})
    weights: dict[str, dict[str, float]] = {}
    for name in names:
        row: dict[str, float] = {}
        for own in models.values():
            for replica_id, share in own.get(name, own[ANY_TYPE]).items():
                row[replica_id] = share / len(models)
        weights[name] = rounded(row)
    return weights


def equal(replicas: tuple[ReplicaSpec, ...]) -> dict[str, dict[str, float]]:
    """Equal shares for the replicas of each model."""
    counts = Counter(spec.model_id for spec in replicas)
    ordered = sorted(replicas, key=lambda spec: spec.replica_id)
    row = {spec.replica_id: 1.0 / counts[spec.model_id] / len(counts) for spec in ordered}
    return {ANY_TYPE: row} if row else {}


def planned(
    replicas: tuple[ReplicaSpec, ...], weights: Rows, *, reason: str, dropped: tuple[str, ...] = ()
) -> Planned:
    """The answer of a policy: None instead of an empty plan, which would stop all serving."""
    plan: DeploymentPlan | None = make_plan(replicas, weights, reason=reason) if replicas else None
    return Planned(plan=plan, reason=reason, dropped=dropped)


def _with_any(rows: Rows) -> dict[str, dict[str, float]]:
    """Rows that sum to 1, with one for "*"; those without any share are left out."""
    own = {name: _normal(row) for name, row in rows.items()}
    own = {name: row for name, row in own.items() if row}
    if own and ANY_TYPE not in own:
        mean: dict[str, float] = {}
        for row in own.values():
            for replica_id, share in row.items():
                mean[replica_id] = mean.get(replica_id, 0.0) + share / len(own)
        own[ANY_TYPE] = mean
    return own


def _normal(row: Mapping[str, float]) -> dict[str, float]:
    shares = {replica_id: share for replica_id, share in sorted(row.items()) if share > 0.0}
    total = sum(shares.values())
    return {replica_id: share / total for replica_id, share in shares.items()}


def rounded(row: Mapping[str, float]) -> dict[str, float]:
    """A whole row, which sums to 1, to ``DIGITS`` digits; the largest share takes up what that
    leaves."""
    shares = {replica_id: round(share, DIGITS) for replica_id, share in row.items()}
    shares = {replica_id: share for replica_id, share in sorted(shares.items()) if share > 0.0}
    largest = max(shares, key=lambda replica_id: shares[replica_id])
    shares[largest] += 1.0 - sum(shares.values())
    return shares
