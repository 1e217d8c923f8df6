"""How far a correction of weights goes: the largest change of any share."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.scheduler.policies.weights import ANY_TYPE
from shared.messages.plans import ReplicaSpec

Weights = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Move:
    """A change of one share, in parts of its model's requests of that row."""

    replica_id: str
    before: float
    after: float

    @property
    def size(self) -> float:
        return abs(self.after - self.before)


def largest_move(before: Weights, after: Weights, replicas: Sequence[ReplicaSpec]) -> Move:
    """From ``before`` to ``after``, both of the same replicas."""
    models: dict[str, list[str]] = defaultdict(list)
    for spec in replicas:
        models[spec.model_id].append(spec.replica_id)
    size, largest = 0.0, Move("", 0.0, 0.0)
    for name in sorted(before.keys() | after.keys()):
        old, new = (rows.get(name, rows.get(ANY_TYPE, {})) for rows in (before, after))
        for own in models.values():
            total = sum(new.get(id_, 0.0) for id_ in own) or 1.0
            for id_ in own:
                was, is_ = old.get(id_, 0.0), new.get(id_, 0.0)
                if abs(is_ - was) > size * total:
                    largest = Move(id_, was / total, is_ / total)
                    size = largest.size
    return largest
