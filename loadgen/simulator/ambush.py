"""Faults that wait for a phase of a switch.

Most phases are over in a moment: incidents at times drawn by chance would rarely meet them.
"""

import random
from collections import Counter
from collections.abc import Sequence

from loadgen.simulator.faults import Incident, IncidentKind
from loadgen.simulator.world import World
from services.switcher.core import Switcher
from services.switcher.machine import State

KINDS: tuple[IncidentKind, ...] = ("crash", "crash", "stall", "partition", "slow")
SWITCHER = "switcher"
TWIN: IncidentKind = "twin"


class Ambush:
    """Strikes one of ``nodes``, or the switcher, as that enters one of ``phases``: up to ``most``
    times in a run, and not after ``until_s``. ``struck``: how often in which phase."""

    def __init__(
        self,
        world: World,
        rng: random.Random,
        *,
        nodes: Sequence[str],
        phases: Sequence[State],
        most: int,
        until_s: float,
    ) -> None:
        self.struck: Counter[str] = Counter()
        self._world, self._rng = world, rng
        self._nodes, self._until_s = (*nodes, SWITCHER), until_s
        self._waiting = [rng.choice(phases) for _ in range(rng.randint(0, most))]
        self._state = ""
        world.watches.append(self._look)

    def _look(self) -> None:
        core = self._world.core(SWITCHER)
        state = core.state if isinstance(core, Switcher) else ""
        if state == self._state:
            return
        self._state = state
        if state in self._waiting and self._world.now_s < self._until_s:
            self._waiting.remove(state)
            self.struck[state] += 1
            self._world.plan([self._draw()])

    def _draw(self) -> Incident:
        node = self._rng.choice(self._nodes)
        return Incident(
            kind=self._rng.choice((*KINDS, TWIN) if node == SWITCHER else KINDS),
            node=node,
            at_s=self._world.now_s,
            for_s=self._rng.choice([0.3, 1.5, 4.0]) * self._rng.uniform(0.5, 1.5),
            factor=self._rng.choice([3.0, 30.0, 300.0]),
        )
