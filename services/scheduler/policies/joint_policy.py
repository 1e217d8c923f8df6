"""Policy "oserve": the exact joint plan, ranked by predicted tails, and moved to only if that pays.

Each period:

1. What to plan for: quantiles of the forecast, corrected by what was seen (``horizon``), and for
   how long that may be expected to last (``horizon_lasting``).
2. The plan: counts and shares together (``joint``), the best of near-optimal plans by lateness, or
   where GPUs may be left unused, the cheapest that is on time (``joint_choice``, ``joint_refine``).
3. The replicas in force, under the best shares for what is expected now. New shares cost nothing
   and are taken when they differ. Other replicas cost a switch: a step towards them is taken if
   the gain exceeds the error of its prediction, and the way there is affordable
   (``transition_verdict``).

Replicas that were chosen are held (``transition_memory``) unless demand is no longer near that for
which they were chosen, they are overloaded, GPUs came or went, or they are one step of a longer
way. While a switch that was asked for is under way, nothing new is asked for: the switcher would
not hear of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.scheduler.policies.capacity import Column, Table, build
from services.scheduler.policies.capacity_plan import Placed, place_counts, weights
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.decision import Look, capacity_note, decision
from services.scheduler.policies.horizon import HORIZON_S, Foresight
from services.scheduler.policies.horizon_judge import weighed
from services.scheduler.policies.horizon_lasting import LASTS_S, Lasting
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.joint_choice import (
    Candidate,
    LatencySource,
    candidates,
    choose,
    solve_capacity,
)
from services.scheduler.policies.joint_refine import refine
from services.scheduler.policies.starting import plan_default
from services.scheduler.policies.transition import Change
from services.scheduler.policies.transition_columns import columns_of
from services.scheduler.policies.transition_memory import Asked, Memory
from services.scheduler.policies.transition_verdict import Verdict, verdict
from services.scheduler.policies.weights import planned
from shared.messages.decisions import Decision, SwitchOutlook

PERIOD_S = 30.0
SHARE_MIN = 0.02  # weights that differ less stay
PROGRAMS = 32  # solved for one decision at most, each in its part of the time limit


class OServe:
    """Registered as "oserve"."""

    period_s = PERIOD_S
    slow = True

    def __init__(
        self,
        source: LatencySource | None = None,
        *,
        payback_s: float = LASTS_S,
        switch_s: float | None = None,
    ) -> None:
        """``payback_s``: how long a plan is expected to last at first; ``switch_s``: how long a
        switch takes; None: as long as new replicas take to start."""
        self._source = source or CostRates()
        self._switch_s = switch_s
        self._foresight, self._lasting, self._memory = Foresight(), Lasting(payback_s), Memory()

    def plan(self, problem: Problem) -> Planned:
        self._memory.look(problem)
        under_way = self._memory.under_way(problem)
        if under_way is not None:
            return under_way
        foreseen = self._foresight.foresee(problem)
        horizon_s = max((m.horizon_s for m in problem.models), default=0.0) or HORIZON_S
        lasts_s = self._lasting.now(foreseen.lines, problem.now_s, horizon_s=horizon_s)
        every = build(foreseen.high, self._source)
        table = every.only(every.servable())
        if not table.columns or not table.types:
            why = every.shortcomings() or "no GPU is on offer"
            decision = Decision(policy="oserve", missing=(why,))
            return Planned(plan=None, reason=why, decision=decision)
        judge = weighed(foreseen, table, self._source, horizon_s=lasts_s)
        limit_s = problem.time_limit_s / PROGRAMS
        models = [model.model_id for model in problem.models]
        best, terms = solve_capacity(table, models, time_limit_s=limit_s, needs=problem.needs)
        look = Look(
            judge=judge, foreseen=foreseen, every=every, best=best, terms=terms, lasts_s=lasts_s
        )
        if best is None or not best.counts:
            return self._unsolved(look, limit_s)
        look.found += candidates(judge, best, terms, time_limit_s=limit_s)
        choice = choose(look.found, elastic=best.goal == "thrift")
        if best.goal != "thrift":
            choice = refine(judge, choice, terms)
        return self._answer(look, choice)
