"""From counts and shares by column to a deployment plan: replicas on named GPUs, and weights."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array, best_flow
from services.scheduler.policies.placing import Shape, place
from services.scheduler.policies.weights import ANY_TYPE, joined
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

NOTHING = 1e-9  # headroom: a solver's zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Replicas on GPUs; ``dropped`` names those that found no room."""

    replicas: tuple[ReplicaSpec, ...]
    columns: Mapping[str, Column]  # by replica
    dropped: tuple[str, ...]
    reason: str

    @property
    def counts(self) -> Counter[Column]:
        return Counter(self.columns.values())


def place_counts(table: Table, counts: Mapping[Column, int], in_force: DeploymentPlan) -> Placed:
    """Replicas for ``counts``, pool by pool."""
    replicas: list[ReplicaSpec] = []
    columns: dict[str, Column] = {}
    dropped: list[str] = []
    reasons: list[str] = []
    for pool in table.pools.values():
        own: dict[Shape, int] = {
            (column.model_id, column.shape): count
            for column, count in counts.items()
            if column.pool == pool.name and count > 0
        }
        if not own:
            continue
        done = place(own, pool.offers, in_force, taken=[spec.replica_id for spec in replicas])
        replicas += done.replicas
        dropped += [f"{model_id} {shape} on {pool.name}" for model_id, shape in done.dropped]
        reasons += [done.reason] if done.reason else []
        for spec in done.replicas:
            shape = Parallelism.parse(spec.parallelism)
            columns[spec.replica_id] = Column(spec.model_id, pool.name, shape)
    return Placed(
        replicas=tuple(sorted(replicas, key=lambda spec: spec.replica_id)),
        columns=columns,
        dropped=tuple(dropped),
        reason="; ".join(reasons),
    )


def weights(table: Table, placed: Placed, shares: Array) -> dict[str, dict[str, float]]:
    """Rows of weights: ``shares`` [S, J] of each type by column, equal among identical replicas. A
    type without shares has no row: "*" serves it, which mixes the model's types by their demand,
    or treats its replicas alike where none of them has shares."""
    index = {column: s for s, column in enumerate(table.columns)}
    counts = placed.counts
    rows: dict[str, dict[str, dict[str, float]]] = {
        model_id: defaultdict(dict) for model_id in sorted({c.model_id for c in counts})
    }
    for replica_id, column in placed.columns.items():
        own, each = rows[column.model_id], shares[index[column]] / counts[column]
        for j, kind in enumerate(table.types):
            if kind.model_id == column.model_id and each[j] > 0:
                own[kind.name][replica_id] = float(each[j])
                mixed = float(each[j]) * kind.arrivals_rps
                own[ANY_TYPE][replica_id] = own[ANY_TYPE].get(replica_id, 0.0) + mixed
    for model_id, own in rows.items():
        if not own.get(ANY_TYPE):
            own[ANY_TYPE] = {
                replica_id: 1.0
                for replica_id, column in placed.columns.items()
                if column.model_id == model_id
            }
    return joined(rows)


def brief(counts: Mapping[Column, int]) -> str:
    """``2 x tp4, 1 x tp2pp2``; with models and pools where there are several."""
    models = {column.model_id for column in counts}
    kinds = {column.pool for column in counts}
    parts: list[str] = []
    whole: Counter[Column] = Counter()
    for column, count in counts.items():
        whole[replace(column, group=0)] += count
    for column, count in sorted(whole.items()):
        shape = str(column.shape).removesuffix("pp1")
        name = f"{column.model_id} {shape}" if len(models) > 1 else shape
        parts.append(f"{count} x {name}" + (f" on {column.pool}" if len(kinds) > 1 else ""))
    return ", ".join(parts) or "nothing"


def even_shares(table: Table, counts: Mapping[Column, int]) -> Array:
    """[S, J]: the dispatch of ``counts`` at the greatest headroom. If they cannot serve some of
    every type, the one that serves most requests, and types that this leaves out entirely go where
    they can be served, in proportion to rates."""
    instance = table.instance(counts)
    even = best_flow(instance, "headroom")
    assert even is not None, "no flow at all is a flow"
    if even.headroom > NOTHING:
        return spread(even.shares())
    most = best_flow(instance, "served")
    assert most is not None, "no flow at all is a flow"
    usable = table.rates * instance.copies[:, None]
    return np.where(most.sent.any(axis=0), most.shares(), spread(usable))


def spread(shares: Array) -> Array:
    """``shares`` with every column that has any scaled to sum to 1: every request goes somewhere,
    whatever of its type can be served in time."""
    totals = shares.sum(axis=0)
    return np.divide(shares, totals, out=np.zeros_like(shares), where=totals > 0)
