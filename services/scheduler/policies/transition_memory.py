"""What was asked for last, and so whether replicas are kept for it: who is asked each period must
not answer to noise.

A plan that was asked for is under way until the replicas in force change, or for as long as it may
take. Replicas that came of it are held for ``HELD_S``, unless there is a reason to ask anew.
"""

from dataclasses import dataclass

from services.scheduler.policies.horizon_lasting import Demand, near
from services.scheduler.policies.interface import Planned, Problem
from shared.messages.plans import ReplicaSpec

HELD_S = 3600.0
REVIEW_S = 60.0  # between two comparisons of the replicas in force with all other plans
PATIENCE = 2.0  # times as long as it should take, a switch may be under way
PATIENCE_S = 30.0  # and so much longer

Replicas = frozenset[ReplicaSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """``answer``: what was asked for, from replicas ``before``, at ``at_s``, for ``demand`` on GPUs
    ``offered``. It leads to ``after``, step ``done`` of the way to ``target``, in ``seconds``."""

    answer: Planned
    at_s: float
    seconds: float
    epoch: int
    before: Replicas
    after: Replicas
    target: tuple[ReplicaSpec, ...]
    done: int
    demand: Demand
    offered: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Review:
    at_s: float
    replicas: Replicas
    demand: Demand
    offered: frozenset[str]


class Memory:
    """Of one plan: the last that moved replicas. And of when all plans were compared last."""

    def __init__(self) -> None:
        self._asked: Asked | None = None
        self._review: _Review | None = None
        self._stands_since_s: float | None = None

    def asked(self, asked: Asked) -> None:
        self._asked, self._stands_since_s = asked, None

    def look(self, problem: Problem) -> None:
        """Notice whether what was asked for stands."""
        if self._asked is None or self._asked.after != frozenset(problem.in_force.replicas):
            self._stands_since_s = None
        elif self._stands_since_s is None:
            self._stands_since_s = problem.now_s

    def reviewed(self, problem: Problem, demand: Demand) -> None:
        """All plans were compared, and the replicas in force stay."""
        self._review = _Review(
            at_s=problem.now_s,
            replicas=frozenset(problem.in_force.replicas),
            demand=demand,
            offered=offered(problem),
        )

    def review_due(self, problem: Problem, demand: Demand, *, horizon_s: float) -> bool:
        """Whether they are to be compared again: a while has passed, replicas or GPUs are others,
        or demand is, or the replicas in force are one step of a way."""
        last = self._review
        return (
            last is None
            or not 0.0 <= problem.now_s - last.at_s < REVIEW_S
            or last.replicas != frozenset(problem.in_force.replicas)
            or last.offered != offered(problem)
            or self.way(problem) is not None
            or not near(last.demand, demand, horizon_s=horizon_s)
        )

    def under_way(self, problem: Problem) -> Planned | None:
        """The answer that is being put in force, to be given again."""
        asked = self._asked
        if asked is None or asked.epoch != problem.epoch or asked.offered != offered(problem):
            return None
        same = asked.before == frozenset(problem.in_force.replicas)
        waited_s = problem.now_s - asked.at_s
        patient = 0.0 <= waited_s <= PATIENCE * asked.seconds + PATIENCE_S
        return asked.answer if same and patient else None

    def way(self, problem: Problem) -> tuple[tuple[ReplicaSpec, ...], int] | None:
        """Where the replicas in force are one step on the way to, and how many steps were walked;
        None when they are no such step, or some GPU of it is gone."""
        asked = self._asked
        if asked is None or self._stands_since_s is None:
            return None
        gpus = {gpu for spec in asked.target for gpu in spec.gpus}
        if asked.after == frozenset(asked.target) or not gpus <= offered(problem):
            return None
        return asked.target, asked.done

    def holds(self, problem: Problem, demand: Demand, *, horizon_s: float) -> str:
        """Why replicas stay whatever else is better, as far as demand and GPUs tell; empty when
        they need not."""
        asked = self._asked
        if asked is None or self._stands_since_s is None or asked.offered != offered(problem):
            return ""
        stood_s = min(problem.dwell_s, problem.now_s - self._stands_since_s)
        if stood_s >= HELD_S or not near(asked.demand, demand, horizon_s=horizon_s):
            return ""
        return f"chosen for this demand and in force for {stood_s:.0f} s of {HELD_S:.0f}"


def offered(problem: Problem) -> frozenset[str]:
    """GPUs that may be planned onto."""
    return frozenset(offer.gpu_id for offer in problem.offers)
