"""Where replicas go: from counts of shapes to replicas on named GPUs, moving as little as can be.

A replica sits on GPUs of one kind, and each tensor-parallel group on one node: its all-reduces
would cross the network otherwise. Pipeline stages may be on different nodes where no one node has
room for all. Standing replicas of a wanted shape stay, on the fewest nodes if there are too many
of them; then the largest new ones choose first, each the node that it fills best. When one finds
no room although enough GPUs are free, standing replicas are moved out of its way, the fewest GPUs
first. Same input, same placement.

Sizes that are powers of two pack this way whenever they fit nodes of such sizes at all; other
sizes are packed first-fit in falling size, which may leave out what an exhaustive search would fit.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.scheduler.policies.interface import GpuOffer
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

Shape = tuple[str, Parallelism]
"""Model and parallelism."""

SLUG_MAX = 40  # of a model's name in a replica's id, which holds at most 64 characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """``replicas`` by id; ``dropped``: what found no room, one entry for each replica; ``reason``
    says what was moved or left out, empty when nothing was."""

    replicas: tuple[ReplicaSpec, ...]
    dropped: tuple[Shape, ...] = ()
    reason: str = ""


def place(
    counts: Mapping[Shape, int],
    offers: Iterable[GpuOffer],
    in_force: DeploymentPlan,
    *,
    taken: Collection[str] = (),
) -> Placement:
    """Replicas for ``counts`` on ``offers``. Standing ones keep their ids; new ones get the lowest
    free number of their shape, such as ``llama-2-70b-tp4-0``, that names neither a replica in force
    nor one of ``taken``."""
    known = sorted(offers, key=lambda offer: offer.gpu_id)
    standing = _standing(in_force, counts, known)
    kept = standing
    best = _fill(counts, known, kept)
    while best.short and (fewer := _evict(best.short[0], known, kept)) is not None:
        kept = fewer
        attempt = _fill(counts, known, kept)
        if attempt.rank > best.rank:
            best = attempt
    return _named(best, in_force, taken, moved=len(standing) - len(best.kept))


def fits(counts: Mapping[Shape, int], offers: Iterable[GpuOffer]) -> bool:
    """Whether ``place`` would find room for all of ``counts``, were nothing standing."""
    return not _fill(counts, list(offers), ()).short


def shape_of(spec: ReplicaSpec) -> Shape:
    return spec.model_id, Parallelism.parse(spec.parallelism)


def standing_shapes(plan: DeploymentPlan) -> Counter[Shape]:
    """How many replicas of each shape a plan has."""
    return Counter(shape_of(spec) for spec in plan.replicas)


@dataclass(frozen=True, slots=True)
class _Filled:
    """One attempt: standing replicas that stay, GPUs of new ones, and what found no room."""

    kept: tuple[ReplicaSpec, ...]
    new: tuple[tuple[Shape, tuple[str, ...]], ...]
    short: tuple[Shape, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """What found no room, in replicas; and as a tie-break what stays."""
        return -len(self.short), len(self.kept)


def _standing(
    in_force: DeploymentPlan, counts: Mapping[Shape, int], offers: Sequence[GpuOffer]
) -> tuple[ReplicaSpec, ...]:
    """Replicas in force that can stay. Of too many of a shape those stay that share their nodes
    with most of their like, so that whole nodes become free."""
    node_of = {offer.gpu_id: offer.node_id for offer in offers}
    groups: dict[Shape, list[ReplicaSpec]] = defaultdict(list)
    for spec in sorted(in_force.replicas, key=lambda spec: spec.replica_id):
        shape = shape_of(spec)
        if counts.get(shape, 0) > 0 and spec.gpus and all(gpu in node_of for gpu in spec.gpus):
            groups[shape].append(spec)
    kept: list[ReplicaSpec] = []
    for shape, specs in groups.items():
        on_node = Counter(node_of[spec.gpus[0]] for spec in specs)

        def crowd(spec: ReplicaSpec, on_node: Counter[str] = on_node) -> tuple[int, str, str]:
            node_id = node_of[spec.gpus[0]]
            return -on_node[node_id], node_id, spec.replica_id

        kept += sorted(specs, key=crowd)[: counts[shape]]
    return tuple(sorted(kept, key=lambda spec: spec.replica_id))


def _fill(
    counts: Mapping[Shape, int], offers: Sequence[GpuOffer], kept: tuple[ReplicaSpec, ...]
) -> _Filled:
    """New replicas beside the ``kept`` ones, the largest first."""
    in_use = {gpu for spec in kept for gpu in spec.gpus}
    free = [offer for offer in offers if offer.gpu_id not in in_use]
    have = Counter(shape_of(spec) for spec in kept)
    wanted = [shape for shape, count in counts.items() for _ in range(max(0, count - have[shape]))]
    new: list[tuple[Shape, tuple[str, ...]]] = []
    short: list[Shape] = []
    for shape in sorted(wanted, key=lambda shape: (-shape[1].tp, -shape[1].gpus, shape)):
        gpus = choose(shape[1], [offer for offer in free if offer.serves(shape[0])])
        if not gpus:
            short.append(shape)
            continue
        new.append((shape, gpus))
        free = [offer for offer in free if offer.gpu_id not in gpus]
    return _Filled(kept, tuple(new), tuple(short))


def choose(shape: Parallelism, free: Iterable[GpuOffer]) -> tuple[str, ...]:
    """GPUs for one replica, in the order of its ranks (those of a stage are neighbours): on the one
    node where fewest would be left over, else stage by stage; empty when there is no room."""
    by_node: dict[tuple[str, str], list[str]] = defaultdict(list)
    for offer in sorted(free, key=lambda offer: (offer.node_id, offer.gpu_id)):
        by_node[offer.kind, offer.node_id].append(offer.gpu_id)
    whole = [(len(gpus), key) for key, gpus in by_node.items() if len(gpus) >= shape.gpus]
    if whole:
        return tuple(by_node[min(whole)[1]][: shape.gpus])
    for kind in sorted({kind for kind, _ in by_node}):
        nodes = [gpus for (of, _), gpus in sorted(by_node.items()) if of == kind]
        stages = [
            gpus[i : i + shape.tp]
            for gpus in sorted(nodes, key=len, reverse=True)  # few nodes: hops between them cost
            for i in range(0, len(gpus) - shape.tp + 1, shape.tp)
        ]
        if len(stages) >= shape.pp:
            return tuple(gpu for stage in stages[: shape.pp] for gpu in stage)
    return ()


def _evict(
    shape: Shape, offers: Sequence[GpuOffer], kept: tuple[ReplicaSpec, ...]
) -> tuple[ReplicaSpec, ...] | None:
    """``kept`` without the replicas to move for ``shape``: those on the node where fewest GPUs have
    to be emptied for one stage of it; None when nothing more can be moved."""
    if not kept:
        return None
    node_of = {offer.gpu_id: offer.node_id for offer in offers}
    sizes = Counter(node_of.values())
    there: dict[str, list[ReplicaSpec]] = defaultdict(list)
    used: Counter[str] = Counter()
    for spec in kept:
        used.update(node_of[gpu] for gpu in spec.gpus)
        for node_id in sorted({node_of[gpu] for gpu in spec.gpus}):
            there[node_id].append(spec)
    whole = shape[1].gpus
    size = whole if whole <= max(sizes.values()) else shape[1].tp
    options: list[tuple[int, str, list[ReplicaSpec]]] = []
    for node_id, specs in there.items():
        lacking, moved = size - (sizes[node_id] - used[node_id]), list[ReplicaSpec]()
        for spec in sorted(specs, key=lambda spec: (len(spec.gpus), spec.replica_id)):
            if lacking <= 0 and moved:
                break
            moved.append(spec)
            lacking -= sum(1 for gpu in spec.gpus if node_of[gpu] == node_id)
        if lacking <= 0:
            options.append((sum(len(spec.gpus) for spec in moved), node_id, moved))
    if not options:
        return () if kept else None  # no one node will do: place everything anew
    moved = min(options, key=lambda option: option[:2])[2]
    return tuple(spec for spec in kept if spec not in moved)


def _named(
    filled: _Filled, in_force: DeploymentPlan, taken: Collection[str], *, moved: int
) -> Placement:
    used = {spec.replica_id for spec in in_force.replicas} | set(taken)
    replicas = list(filled.kept)
    for (model_id, parallelism), gpus in filled.new:
        replica_id = _free_id(model_id, parallelism, used)
        used.add(replica_id)
        replicas.append(
            ReplicaSpec(
                replica_id=replica_id,
                model_id=model_id,
                parallelism=str(parallelism),
                gpus=gpus,
            )
        )
    notes = [f"{moved} standing replicas moved to make room"] if moved else []
    notes += [
        f"{count} x {model_id} {brief(parallelism)} left out: no room"
        for (model_id, parallelism), count in sorted(Counter(filled.short).items())
    ]
    return Placement(
        replicas=tuple(sorted(replicas, key=lambda spec: spec.replica_id)),
        dropped=filled.short,
        reason="; ".join(notes),
    )


def _free_id(model_id: str, parallelism: Parallelism, used: Collection[str]) -> str:
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", model_id)[:SLUG_MAX]
    number = 0
    while (replica_id := f"{slug}-{brief(parallelism)}-{number}") in used:
        number += 1
    return replica_id


def brief(parallelism: Parallelism) -> str:
    """``tp4``, or ``tp4pp2`` where there is a pipeline."""
    return f"tp{parallelism.tp}" + (f"pp{parallelism.pp}" if parallelism.pp > 1 else "")
