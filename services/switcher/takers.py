"""Who takes whose requests over when replicas go. Pure.

The requests of a replica that goes are for the replicas of its model that come onto its GPUs:
their KV cache has the shortest way there. Replicas that share GPUs are joined to one *takeover*,
in which the requests of all that go are spread over all that come, as the target's weights say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.switcher.differences import arriving, leaving, staying
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import Shares
from shared.placement.spread import ANY_TYPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """The requests of ``sources``, which go, are spread over ``takers``."""

    sources: tuple[ReplicaSpec, ...]
    takers: tuple[ReplicaSpec, ...]
    shares: Shares


def takeovers(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[Takeover, ...]:
    """One for each group of replicas that have requests to hand over; none is in two. Where
    nobody comes onto the GPUs of one that goes, all that come for its model take requests; where
    nobody comes at all, those that stay. Without any of the model there is no takeover."""
    going, coming = leaving(origin, target), arriving(origin, target)
    kept = staying(origin, target)
    found: list[Takeover] = []
    for model_id in sorted({spec.model_id for spec in going}):
        sources, takers, stay = (_of(model_id, specs) for specs in (going, coming, kept))
        groups = [(sources, takers or stay)] if takers or stay else []
        if takers:
            near = _joined(sources, takers)
            if all(takers_near for sources_near, takers_near in near if sources_near):
                groups = [(s, t) for s, t in near if s]
        found += [
            Takeover(sources=s, takers=t, shares=_shares(target, t)) for s, t in groups if s and t
        ]
    return tuple(found)


def orphans(origin: DeploymentPlan, target: DeploymentPlan) -> tuple[str, ...]:
    """Models of which replicas go and none is left to take their requests over."""
    served = {spec.model_id for spec in target.replicas}
    return tuple(sorted({spec.model_id for spec in leaving(origin, target)} - served))


def _of(model_id: str, specs: Iterable[ReplicaSpec]) -> tuple[ReplicaSpec, ...]:
    return tuple(
        sorted((s for s in specs if s.model_id == model_id), key=lambda spec: spec.replica_id)
    )


def _joined(
    sources: Sequence[ReplicaSpec], takers: Sequence[ReplicaSpec]
) -> list[tuple[tuple[ReplicaSpec, ...], tuple[ReplicaSpec, ...]]]:
    """Sources and takers by the GPUs that they share, directly or through others."""
    groups: list[tuple[set[str], list[ReplicaSpec]]] = []
    for spec in (*sources, *takers):
        gpus, members = set(spec.gpus), [spec]
        apart: list[tuple[set[str], list[ReplicaSpec]]] = []
        for group in groups:
            if group[0] & gpus:
                gpus |= group[0]
                members = [*group[1], *members]
            else:
                apart.append(group)
        groups = [*apart, (gpus, members)]
    return [
        (
            tuple(spec for spec in sources if spec in members),
            tuple(spec for spec in takers if spec in members),
        )
        for _, members in groups
    ]


def _shares(target: DeploymentPlan, takers: Sequence[ReplicaSpec]) -> Shares:
    """The target's weights, restricted to the takers; equal where it gives them none."""
    ids = [spec.replica_id for spec in takers]
    rows = {
        request_type: _restricted(row, ids)
        for request_type, row in sorted({ANY_TYPE: {}, **target.weights}.items())
    }
    return Shares(rows=rows, leaders={spec.replica_id: spec.gpus[0] for spec in takers})


def _restricted(row: dict[str, float], ids: Sequence[str]) -> dict[str, float]:
    total = sum(row.get(replica_id, 0.0) for replica_id in ids)
    if total <= 0:
        return dict.fromkeys(ids, 1.0 / len(ids))
    return {i: row[i] / total for i in ids if row.get(i, 0.0) > 0}
