"""When the scheduler's next decision is due, and whether a solve is under way."""

from collections.abc import Collection
from dataclasses import dataclass

from services.scheduler.policies.interface import Planned
from shared.messages.plans import ReplicaSpec

EARLY = 0.9
"""A forecast that comes this share of a period after the last decision is acted on at once, so
that decisions fall into step with forecasts instead of always using one that is nearly as old as
a period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a decision is made on, as far as a change of it brings the next one forward.

    ``gpus``: on offer. ``forecasts``: heard so far. ``starting``: nothing is expected yet, so that
    the mesh starts from its topology rather than from a forecast. ``wanted``: models that have no
    replica and turned requests away.
    """

    gpus: frozenset[str]
    forecasts: int
    starting: bool
    wanted: frozenset[str] = frozenset()


class Agenda:
    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._decided_s: float | None = None
        self._outlook = Outlook(gpus=frozenset(), forecasts=0, starting=True)
        self.solving_since_s: float | None = None
        self.solving_for: tuple[ReplicaSpec, ...] = ()  # the replicas that the solve goes out from
        self._step: frozenset[ReplicaSpec] | None = None
        self.overdue = False  # the solve under way has had its time: its answer counts no more

    @property
    def solving(self) -> bool:
        return self.solving_since_s is not None

    def due(self, now_s: float, outlook: Outlook) -> bool:
        """Before the first forecast each time, then each period, and at once when GPUs come or
        go, or somebody asks for a model that nothing serves."""
        last = self._outlook
        if self._decided_s is None or self._period_s <= 0.0 or outlook.starting or last.starting:
            return True
        if outlook.gpus != last.gpus or outlook.wanted - last.wanted:
            return True
        periods = (now_s - self._decided_s) / self._period_s
        return periods >= 1.0 or (periods >= EARLY and outlook.forecasts > last.forecasts)

    def decided(self, now_s: float, outlook: Outlook) -> None:
        self._decided_s, self._outlook = now_s, outlook

    def again(self) -> None:
        """The last decision came to nothing: the next one is due now."""
        self._decided_s = None

    def leads_to(self, planned: Planned) -> None:
        """What was decided: when a step of a longer way stands, the next decision is due."""
        plan = planned.plan if planned.unfinished else None
        self._step = frozenset(plan.replicas) if plan else None

    def stands(self, replicas: Collection[ReplicaSpec]) -> None:
        """These are in force."""
        if self._step is not None and self._step == frozenset(replicas):
            self._step = None
            self.again()

    def solve_started(self, now_s: float, replicas: tuple[ReplicaSpec, ...]) -> None:
        assert not self.solving, "one solve at a time"
        self.solving_since_s, self.solving_for, self.overdue = now_s, replicas, False

    def solve_ended(self) -> None:
        self.solving_since_s = None
