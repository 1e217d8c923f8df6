"""What goes wrong in a run, all of it drawn from the seed.

Each run draws its own rates first: under one mild fixed mix most bugs never show.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

IncidentKind = Literal["crash", "stall", "partition", "twin", "slow"]
"""crash: the process dies; a new one that remembers nothing starts ``for_s`` later.
stall: it stands still (SIGSTOP, a long pause), then finds all it missed.
partition: nothing passes between it and the others.
slow: messages to and from it take ``factor`` times as long.
twin: it stalls, is taken for dead and replaced at once, wakes up half way beside its
replacement, and is ended after ``for_s``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """The network's behaviour. Delays are ``delay_s_max * u**skew``: mostly short with a long
    tail, so that messages overtake each other."""

    delay_s_min: float = 0.0005
    delay_s_max: float = 0.002
    skew: int = 1
    loss: float = 0.0
    duplicate: float = 0.0
    conflict: float = 0.0  # share of writes that take place and are reported as lost races
    steady: bool = field(init=False)
    """Every message takes the same time, and nothing goes wrong."""

    def __post_init__(self) -> None:
        unsteady = self.delay_s_max or self.loss or self.duplicate or self.conflict
        object.__setattr__(self, "steady", not unsteady)

    def delay_s(self, rng: random.Random) -> float:
        return self.delay_s_min + self.delay_s_max * rng.random() ** self.skew


CALM = Weather()


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    kind: IncidentKind
    node: str
    at_s: float
    for_s: float
    factor: float = 1.0


def draw_weather(rng: random.Random) -> Weather:
    return Weather(
        delay_s_max=rng.choice([0.002, 0.05, 0.5, 3.0]),
        skew=rng.choice([2, 4, 8]),
        loss=rng.choice([0.0, 0.01, 0.1, 0.3]),
        duplicate=rng.choice([0.0, 0.05, 0.3]),
        conflict=rng.choice([0.0, 0.0, 0.2]),
    )


def draw_incidents(
    rng: random.Random,
    *,
    nodes: Sequence[str],
    twins: Sequence[str],
    until_s: float,
    incidents_max: int,
) -> list[Incident]:
    """Up to ``incidents_max`` incidents, over by ``until_s``. Only ``twins`` may wake up beside
    a replacement: of the others the supervisor makes sure."""
    incidents: list[Incident] = []
    for _ in range(rng.randint(0, incidents_max)):
        at_s = rng.uniform(0.0, until_s * 0.8)
        for_s = min(rng.choice([0.3, 1.5, 4.0, 10.0]) * rng.uniform(0.5, 1.5), until_s - at_s)
        node = rng.choice(nodes)
        kinds: list[IncidentKind] = ["crash", "crash", "stall", "partition", "slow"]
        if node in twins:
            kinds.extend(("twin", "twin"))
        factor = rng.choice([3.0, 30.0, 300.0])
        incidents.append(
            Incident(kind=rng.choice(kinds), node=node, at_s=at_s, for_s=for_s, factor=factor)
        )
    return sorted(incidents, key=lambda incident: incident.at_s)
