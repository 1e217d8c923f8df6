"""What a switch costs that the switcher walks live.

New replicas get ready while old ones serve: their engines start, and weights come over the links
from GPUs that have them. Then the old ones stand still for as long as requests take to change
hands, which is what the switch costs. GPUs that old and new replicas share may have no room for
both: then their weights come in the pause, at worst all of them.

The switcher decides by itself (services/switcher/way.py): this only foresees it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.transition import Change, Toll
from shared.cost.links import between, copy_s
from shared.cost.memory import weight_bytes
from shared.cost.model import CostModel
from shared.messages.plans import ReplicaSpec

PAUSE_S = 0.25
"""What requests wait for at most while they and the KV cache written last change hands."""
ROOM_MIN = 0.05
"""Of a GPU's memory, that must be free for the first layers and a first KV cache."""


def is_live(made: Change, offers: Iterable[GpuOffer], models: Mapping[str, CostModel]) -> bool:
    """Whether workers can walk it live: something serves already, no replica changes under its
    name, each model that loses replicas keeps or gets one, all GPUs can move the weights, and there
    is room to begin. ``models``: of replicas that go and come, by id, as far as known."""
    before, after = (*made.going, *made.staying), made.after
    again = {spec.replica_id for spec in made.going} & {spec.replica_id for spec in made.coming}
    orphaned = {spec.model_id for spec in made.going} - {spec.model_id for spec in after}
    if not before or again or orphaned:
        return False
    known = {offer.gpu_id: offer for offer in offers}
    able = all(
        gpu in known and spec.model_id in known[gpu].movable for spec, gpu in _concerned(made)
    )
    return able and all(_room(spec, made, known, models) for spec in made.coming)


def _room(
    coming: ReplicaSpec,
    made: Change,
    offers: Mapping[str, GpuOffer],
    models: Mapping[str, CostModel],
) -> bool:
    """Whether its GPUs have memory left to begin with, beside what goes and its KV cache."""
    facts = models[coming.replica_id].gpu
    budget = (facts.memory_bytes - facts.reserved_bytes) * facts.usable
    for spec in made.going:
        model = models.get(spec.replica_id)
        by_stage = _by_stage(model) if model else ()
        for rank, gpu in enumerate(spec.gpus):
            if gpu in coming.gpus:
                if model is None:
                    return False
                held = by_stage[rank // model.shape.tp] + offers[gpu].cache_bytes
                if budget - held < ROOM_MIN * budget:
                    return False
    return True


def live_toll(
    made: Change,
    offers: Iterable[GpuOffer],
    models: Mapping[str, CostModel],
    *,
    running: Mapping[str, float],
) -> Toll:
    """As ``transition.toll``, of a change that is live. Every GPU fetches its whole shard, also
    where it has a part of it already."""
    fetched_s, moved = _fetched_s(made, offers, models)
    shared = {gpu for spec in made.going for gpu in spec.gpus}
    crowded_s = max((s for gpu, s in fetched_s.items() if gpu in shared), default=0.0)
    busiest_s = max(fetched_s.values(), default=0.0)
    start_s = max((models[s.replica_id].gpu.engine_start_s for s in made.coming), default=0.0)
    pause_s = PAUSE_S + crowded_s if made.going else 0.0
    return Toll(
        seconds=start_s + busiest_s + pause_s,
        pause_s=pause_s,
        bytes_moved=moved,
        busiest_link_s=busiest_s,
        requests_paused=sum(running.get(spec.replica_id, 0.0) for spec in made.going),
    )


def _concerned(made: Change) -> Iterator[tuple[ReplicaSpec, str]]:
    """Replicas that go or come, and those that may take requests over, with each of their GPUs."""
    models = {spec.model_id for spec in made.going}
    takers = (spec for spec in made.staying if spec.model_id in models)
    for spec in (*made.going, *made.coming, *takers):
        for gpu in spec.gpus:
            yield spec, gpu


def _fetched_s(
    made: Change, offers: Iterable[GpuOffer], models: Mapping[str, CostModel]
) -> tuple[dict[str, float], float]:
    """How long each GPU's weights are on their way, and the bytes of all. A model that nothing
    serves yet is read from disk, by one GPU of a node after the other."""
    node_of = {offer.gpu_id: offer.node_id for offer in offers}
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for spec in (*made.going, *made.staying):
        homes[spec.model_id].update(node_of[gpu] for gpu in spec.gpus if gpu in node_of)
    seconds, read, moved = dict[str, float](), defaultdict[str, float](float), 0.0
    for spec in made.coming:
        model = models[spec.replica_id]
        by_stage = _by_stage(model)
        for rank, gpu in enumerate(spec.gpus):
            size, node_id = by_stage[rank // model.shape.tp], node_of[gpu]
            moved += size
            if known := homes[spec.model_id]:
                source = node_id if node_id in known else min(known)
                seconds[gpu] = copy_s(between(model.gpu, source, node_id), size)
            else:
                read[node_id] += size
                seconds[gpu] = copy_s(model.gpu.disk, read[node_id])
    return seconds, moved


def _by_stage(model: CostModel) -> tuple[int, ...]:
    return weight_bytes(model.profile.model_facts, model.shape, model.stages)
