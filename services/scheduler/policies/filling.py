"""How many replicas of each model fit, when each model has one shape: handed out one by one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from services.scheduler.policies.interface import GpuOffer
from shared.hardware import Parallelism

Pool = tuple[str, str]
"""A kind of GPU and the model on it."""


class Room:
    """Free GPUs by kind and node, as numbers."""

    def __init__(self, offers: Iterable[GpuOffer]) -> None:
        self._free: dict[str, Counter[str]] = {}
        for offer in offers:
            self._free.setdefault(offer.kind, Counter())[offer.node_id] += 1

    def copy(self) -> "Room":
        room = Room(())
        room._free = {kind: Counter(nodes) for kind, nodes in self._free.items()}
        return room

    def take(self, kind: str, shape: Parallelism) -> bool:
        """Give GPUs to one replica: the node it fills best, else nodes stage by stage."""
        nodes = self._free.get(kind)
        if nodes is None:
            return False
        whole = [(count, node_id) for node_id, count in nodes.items() if count >= shape.gpus]
        if whole:
            nodes[min(whole)[1]] -= shape.gpus
            return True
        if sum(count // shape.tp for count in nodes.values()) < shape.pp:
            return False
        left = shape.pp
        for node_id in sorted(nodes, key=lambda node_id: (-nodes[node_id], node_id)):
            stages = min(left, nodes[node_id] // shape.tp)
            nodes[node_id] -= stages * shape.tp
            left -= stages
        return True


def fill(
    room: Room,
    *,
    shapes: Mapping[str, Parallelism],
    kinds: Mapping[str, Sequence[str]],
    need: Callable[[str, Mapping[Pool, int]], float],
) -> Counter[Pool]:
    """Replicas by kind and model. Each turn the model with the greatest ``need(model, counts)``
    gets one, on the first of its ``kinds`` that has room; one without room, or that needs none
    (0 or less), gets no more. Ties go to the first in ``shapes``."""
    counts: Counter[Pool] = Counter()
    open_ = list(shapes)
    while open_:
        needs = {model_id: need(model_id, counts) for model_id in open_}
        model_id = max(open_, key=lambda model_id: needs[model_id])
        kind = None
        if needs[model_id] > 0.0:
            kind = next((k for k in kinds[model_id] if room.take(k, shapes[model_id])), None)
        if kind is None:
            open_.remove(model_id)
        else:
            counts[kind, model_id] += 1
    return counts
