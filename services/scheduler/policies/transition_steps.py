"""How a change is divided into steps that do not need each other's GPUs.

Replicas that go and replicas that come hang together where they share a GPU. Each connected
component of that graph is a change by itself, and any of them may be walked before any other: what
is in force meanwhile is a plan. They are sorted by what they bring per GPU, so that capacity grows
as early as it can, and divided into as many batches of about as many GPUs as are asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from services.scheduler.policies.transition import Change, change
from shared.messages.plans import ReplicaSpec

STEPS_MAX = 16


def components(made: Change) -> list[Change]:
    """The parts of ``made`` that share no GPU, by their first one; nothing stays in any of them."""
    parts: list[tuple[set[str], list[ReplicaSpec]]] = []
    for spec in (*made.going, *made.coming):
        gpus, members = set(spec.gpus), [spec]
        apart: list[tuple[set[str], list[ReplicaSpec]]] = []
        for other_gpus, others in parts:
            if gpus.isdisjoint(other_gpus):
                apart.append((other_gpus, others))
            else:
                gpus, members = gpus | other_gpus, others + members
        parts = [*apart, (gpus, members)]
    going = set(made.going)
    return [
        Change(
            going=tuple(spec for spec in members if spec in going),
            coming=tuple(spec for spec in members if spec not in going),
            staying=(),
        )
        for _, members in sorted(parts, key=lambda part: min(part[0], default=""))
    ]


def batches(
    parts: Iterable[Change], count: int, carries: Mapping[str, float]
) -> list[list[Change]]:
    """At most ``count`` batches of ``parts``, none empty, those first that bring most per GPU.
    ``carries``, by replica: what it could serve, to any scale."""

    def brings(part: Change) -> tuple[float, int]:
        more = sum(carries.get(spec.replica_id, 0.0) for spec in part.coming)
        more -= sum(carries.get(spec.replica_id, 0.0) for spec in part.going)
        return -more / max(1, gpus_of(part)), gpus_of(part)

    ordered = sorted(parts, key=brings)
    sums = list(accumulate(gpus_of(part) for part in ordered))
    found: list[list[Change]] = [[] for _ in range(max(1, count))]
    for part, upto in zip(ordered, sums, strict=True):
        middle = upto - gpus_of(part) / 2
        found[min(len(found) - 1, int(len(found) * middle / sums[-1]))].append(part)
    return [batch for batch in found if batch]


def walk(before: Sequence[ReplicaSpec], steps: Iterable[Sequence[Change]]) -> list[Change]:
    """Each step as a change of the whole plan: what the one before leads to is what it is from."""
    standing, found = tuple(before), list[Change]()
    for batch in steps:
        going = {spec for part in batch for spec in part.going}
        coming = tuple(spec for part in batch for spec in part.coming)
        found.append(change(standing, (*(s for s in standing if s not in going), *coming)))
        standing = found[-1].after
    return found


def gpus_of(part: Change) -> int:
    return len({gpu for spec in (*part.going, *part.coming) for gpu in spec.gpus})
