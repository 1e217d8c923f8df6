"""What it costs to go from the replicas in force to others, and whether that pays.

Where the switcher reloads, it drains what goes, stops it, and starts what comes in its place; the
others serve on. So a switch lasts as long as running requests are given to end, if anything goes,
and then as long as the slowest new replica takes to start, if anything comes. The weights of new
replicas are read from the disks of their nodes. What it costs where the switcher goes live is in
``transition_live``.

A change may be walked in several steps. It is a list of phases (seconds, lateness, headroom), one
for each switch and one for each stop between two, after which the new plan serves to the end of the
time for which the forecast is trusted. With L before, L' after, horizon H and phases i:

    gain   sum_i max(0, L - L[i]) s[i] + (L - L') max(0, H - sum_i s[i])
    cost   sum_i max(0, L[i] - L) s[i]

in seconds of lateness: a payback test as in HexGen-3's scheduler, in lateness instead of
throughput. Fluids have the second word: demand that finds no capacity waits, and the waiting that a
change lets build up, until it is worked off, may not exceed what staying would (``backlog``).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.scheduler.policies.interface import GpuOffer
from shared.cost.links import copy_s
from shared.cost.memory import weight_bytes
from shared.cost.model import CostModel
from shared.messages.plans import ReplicaSpec

DRAIN_S = 30.0  # what a switch lets running requests go on for: switcher.drain_timeout_s
SECONDS_MIN = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Replicas that go, come and stay. A replica whose GPU is lost is none of them: it has gone."""

    going: tuple[ReplicaSpec, ...]
    coming: tuple[ReplicaSpec, ...]
    staying: tuple[ReplicaSpec, ...]

    @property
    def after(self) -> tuple[ReplicaSpec, ...]:
        return tuple(sorted((*self.staying, *self.coming), key=lambda spec: spec.replica_id))


def change(before: Iterable[ReplicaSpec], after: Iterable[ReplicaSpec]) -> Change:
    """What the switcher would do: a replica stays if nothing about it differs."""
    old, new = tuple(before), tuple(after)
    return Change(
        going=tuple(spec for spec in old if spec not in new),
        coming=tuple(spec for spec in new if spec not in old),
        staying=tuple(spec for spec in old if spec in new),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Toll:
    """What one switch takes, whatever the demand. ``pause_s``: of ``seconds``, in which what goes
    stands still, the last ones; before that it serves on. None: it serves in none of them.
    ``bytes_moved``: weights of new replicas; ``busiest_link_s``: how long the link that carries
    most of them is busy; ``requests_paused``: those that run on replicas that go."""

    seconds: float
    pause_s: float | None = None
    bytes_moved: float = 0.0
    busiest_link_s: float = 0.0
    requests_paused: float = 0.0


def toll(
    made: Change,
    offers: Iterable[GpuOffer],
    models: Mapping[str, CostModel],
    *,
    running: Mapping[str, float],
    drain_s: float = DRAIN_S,
) -> Toll:
    """``models`` of the replicas that come and ``running`` requests of those that go, by id."""
    node_of = {offer.gpu_id: offer.node_id for offer in offers}
    loaded: defaultdict[str, float] = defaultdict(float)
    disk_s: defaultdict[str, float] = defaultdict(float)
    for spec in made.coming:
        model = models[spec.replica_id]
        facts = model.profile.model_facts
        by_stage = weight_bytes(facts, model.shape, model.stages)
        for rank, gpu in enumerate(spec.gpus):
            loaded[node_of[gpu]] += by_stage[rank // model.shape.tp]
        for node_id in {node_of[gpu] for gpu in spec.gpus}:
            disk_s[node_id] = copy_s(model.gpu.disk, loaded[node_id])
    start_s = max((models[spec.replica_id].start_s for spec in made.coming), default=0.0)
    return Toll(
        seconds=(drain_s if made.going else 0.0) + start_s,
        bytes_moved=sum(loaded.values()),
        busiest_link_s=max(disk_s.values(), default=0.0),
        requests_paused=sum(running.get(spec.replica_id, 0.0) for spec in made.going),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A time in which the same replicas serve: their lateness, and times the demand they carry."""

    seconds: float
    lateness: float
    headroom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Payback:
    """``gain`` and ``cost`` in seconds of lateness; ``payback_s``: from the start of the change
    until what was gained exceeds what it cost; None: it never does."""

    gain: float
    cost: float
    payback_s: float | None


def payback(phases: Sequence[Phase], *, before: float, after: float, horizon_s: float) -> Payback:
    """Of a change that leads from lateness ``before`` to ``after`` through ``phases``."""
    spent_s = sum(phase.seconds for phase in phases)
    differences = [(before - phase.lateness) * phase.seconds for phase in phases]
    gain = sum(max(0.0, each) for each in differences)
    cost = sum(max(0.0, -each) for each in differences)
    rate = before - after
    gain += max(0.0, rate) * max(0.0, horizon_s - spent_s)
    net = sum(differences)
    if rate <= 0.0:
        return Payback(gain=gain, cost=cost, payback_s=None)
    return Payback(gain=gain, cost=cost, payback_s=spent_s + max(0.0, -net / rate))


def backlog(phases: Iterable[tuple[float, float]], *, queue: float = 0.0) -> float:
    """The waiting that builds up, in seconds of demand times seconds, over phases of (seconds,
    times the demand that is served), from a ``queue`` in seconds of demand: the area under the
    queue, which is never below zero."""
    area = 0.0
    for seconds, headroom in phases:
        lasts, growth = max(0.0, seconds), 1.0 - headroom
        if growth < 0.0:
            lasts = min(lasts, queue / -growth)  # worked off, and empty from then on
        area += lasts * (queue + growth * lasts / 2.0)
        queue = max(0.0, queue + growth * lasts)
    return area


def strains(phases: Sequence[Phase], *, before: Phase, after: Phase) -> bool:
    """Whether the change lets more waiting build up than staying as ``before`` would, by the end
    of ``after``. Their seconds are the same: the time looked at."""
    spent_s = sum(phase.seconds for phase in phases)
    walked = [(phase.seconds, phase.headroom) for phase in phases]
    walked.append((after.seconds - spent_s, after.headroom))
    return backlog(walked) > backlog([(before.seconds, before.headroom)]) + SECONDS_MIN
