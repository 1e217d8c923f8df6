"""Policy "oserve": the exact joint plan, ranked by predicted tails, and moved to only if that pays.

Each period:

1. What to plan for: quantiles of the forecast, corrected by what was seen (``horizon``), and for
   how long that may be expected to last (``horizon_lasting``).
2. The plans: counts and shares together (``joint``), near-optimal ones beside the best, or where
   GPUs may be left unused, the cheapest (``joint_choice``, ``joint_refine``).
3. The best few of them and the one in force, played through with the last minutes' arrivals
   (``transition_rehearsed``).
4. Whether replicas move: they cost a switch. A step towards the best plan is taken if the gain
   exceeds the error of its prediction, and the way there is affordable (``transition_verdict``).
5. Which types go to which replicas, together or apart (``joint_dispatch``): weights cost nothing.

Replicas that were chosen are held (``transition_memory``) unless demand is no longer near that for
which they were chosen, they are overloaded, GPUs came or went, or they are one step of a longer
way. While a switch that was asked for is under way, nothing new is asked for: the switcher would
not hear of it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from services.scheduler.policies.capacity import build
from services.scheduler.policies.capacity_plan import Placed, weights
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.decision import Look, decision, notes
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
from services.scheduler.policies.joint_dispatch import Dispatcher
from services.scheduler.policies.joint_refine import refine
from services.scheduler.policies.starting import plan_default
from services.scheduler.policies.transition_columns import columns_of
from services.scheduler.policies.transition_memory import Asked, Memory, offered
from services.scheduler.policies.transition_options import lacking_in, options, placed_of
from services.scheduler.policies.transition_rehearsed import tried
from services.scheduler.policies.transition_rules import Verdict, ruled, words
from services.scheduler.policies.transition_verdict import Move
from services.scheduler.policies.weights import planned
from shared.messages.decisions import Decision, SwitchOutlook

PERIOD_S = 30.0
LATE_SHARE = 0.5  # what a replica that serves a type too late counts, of what it serves
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
        self._dispatcher = Dispatcher()

    def plan(self, problem: Problem) -> Planned:
        self._memory.look(problem)
        under_way = self._memory.under_way(problem)
        if under_way is not None:
            return under_way
        foreseen = self._foresight.foresee(problem)
        lasts_s = self._lasting.now(foreseen.lines, problem.now_s, horizon_s=_horizon_s(problem))
        every = build(foreseen.high, self._source, late_share=LATE_SHARE)
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
            judge=judge,
            foreseen=foreseen,
            shortcomings=every.shortcomings(),
            best=best,
            terms=terms,
            lasts_s=lasts_s,
        )
        if best is None or not best.counts:
            return self._unsolved(look, limit_s)
        if not self._memory.review_due(problem, foreseen.lines, horizon_s=_horizon_s(problem)):
            return self._stays(
                look, "compared with all other plans a while ago, and demand is near what it was"
            )
        found = candidates(judge, best, terms, time_limit_s=limit_s)
        return self._answer(replace(look, found=found))

    def _answer(self, look: Look) -> Planned:
        """The best plan found, if it is worth going to, else the one in force."""
        judge, in_force = look.judge, look.judge.problem.in_force
        columns = columns_of(judge.table, in_force.replicas)
        kept = judge.dispatched(Counter(columns.values())) if columns else None
        choice = choose([*look.found, *([kept] if kept else [])], elastic=look.elastic)
        if not look.elastic:
            choice = refine(judge, choice, look.terms)
        horizon_s = _horizon_s(judge.problem)
        played = tried(
            judge, look.found, kept or choice, choice, horizon_s=horizon_s, elastic=look.elastic
        )
        look = replace(look, played=played)
        if kept is None:
            return self._begun(look, played.choice)
        before = tuple(spec for spec in in_force.replicas if spec.replica_id in columns)
        held = self._memory.holds(judge.problem, look.foreseen.lines, horizon_s=horizon_s)
        stays: tuple[Move, Verdict] | None = None
        ways = [(*placed_of(look, each), 0) for each in options(played)]
        onwards = self._onwards(look)
        if onwards is not None:
            ways.insert(0 if held else len(ways), onwards)
        for option, placed, done in ways:
            move = Move(
                judge=judge,
                kept=played.kept,
                choice=option,
                before=before,
                placed=placed,
                lasts_s=look.lasts_s,
                switch_s=self._switch_s,
                done=done,
                scale=played.scale,
            )
            lacking = lacking_in(judge.table, kept, option, look.terms)
            found = ruled(move, held=held, lacking=lacking)
            if found.moves:
                return self._stepped(look, move, found)
            stays = stays or (move, found)
            if not (found.unreachable or done):
                break
        assert stays is not None, "the choice was tried"
        return self._kept(look, *stays)

    def _begun(self, look: Look, choice: Candidate) -> Planned:
        """Nothing stands that could be kept: the best that was found and played through."""
        choice, placed = placed_of(look, choice)
        return self._plan(look, choice, placed, words("the plan", choice))

    def _onwards(self, look: Look) -> tuple[Candidate, Placed, int] | None:
        """Where the way leads that the replicas in force are a step of, and how many steps were
        walked; None when they are none."""
        way = self._memory.way(look.judge.problem)
        if way is None:
            return None
        target, done = way
        columns = columns_of(look.judge.table, target)
        if len(columns) < len(target):
            return None
        onwards = look.judge.dispatched(Counter(columns.values()))
        return onwards, Placed(replicas=target, columns=columns, dropped=(), reason=""), done

    def _stepped(self, look: Look, move: Move, found: Verdict) -> Planned:
        """The first step of the way, a complete plan by itself."""
        assert found.way is not None, "who moves knows the way"
        problem, step = look.judge.problem, found.way.steps[0]
        now, placed = move.choice, move.placed
        if len(found.way.steps) > 1:
            columns = columns_of(look.judge.table, step.after)
            now = look.judge.dispatched(Counter(columns.values()))
            placed = Placed(replicas=step.after, columns=columns, dropped=(), reason="")
        answer = self._plan(
            look, now, placed, found.why, chosen=move.choice, kept=move.kept, switch=found.switch
        )
        answer = replace(answer, unfinished=len(found.way.steps) > 1)
        self._memory.asked(
            Asked(
                answer=answer,
                at_s=problem.now_s,
                seconds=found.way.tolls[0].seconds,
                epoch=problem.epoch,
                before=frozenset(problem.in_force.replicas),
                after=frozenset(step.after),
                target=move.after,
                done=move.done + 1,
                demand=look.foreseen.lines,
                offered=offered(problem),
            )
        )
        return answer

    def _kept(self, look: Look, move: Move, found: Verdict) -> Planned:
        """The replicas in force, types sent to them as is best now."""
        self._memory.reviewed(look.judge.problem, look.foreseen.lines)
        columns = columns_of(look.judge.table, move.before)
        placed = Placed(replicas=move.before, columns=columns, dropped=(), reason="")
        return self._plan(
            look,
            move.kept,
            placed,
            found.why,
            kept=move.kept,
            switch=found.switch,
            refused=None if found.switch is None else move.choice,
        )

    def _unsolved(self, look: Look, limit_s: float) -> Planned:
        """No plan was found in time: the replicas in force, or the default ones."""
        judge, in_force = look.judge, look.judge.problem.in_force
        why = f"no plan was found within {limit_s:g} s"
        if columns_of(judge.table, in_force.replicas):
            return self._stays(look, why)
        default = plan_default(judge.problem)
        told = Decision(policy="oserve", missing=(why,))
        return Planned(plan=default.plan, reason=f"{why}: {default.reason}", decision=told)

    def _stays(self, look: Look, why: str) -> Planned:
        """The replicas in force, with no look at others."""
        judge, in_force = look.judge, look.judge.problem.in_force
        columns = columns_of(judge.table, in_force.replicas)
        kept = judge.dispatched(Counter(columns.values()))
        standing = tuple(spec for spec in in_force.replicas if spec.replica_id in columns)
        placed = Placed(replicas=standing, columns=columns, dropped=(), reason="")
        return self._plan(look, kept, placed, f"{why}: the replicas in force are kept", kept=kept)

    def _plan(  # noqa: PLR0913  # what a plan is told with
        self,
        look: Look,
        now: Candidate,
        placed: Placed,
        why: str,
        *,
        chosen: Candidate | None = None,
        kept: Candidate | None = None,
        refused: Candidate | None = None,
        switch: SwitchOutlook | None = None,
    ) -> Planned:
        """``now`` on ``placed`` replicas, with the dispatch that is best for it; what is in force
        already if that is just so."""
        problem = look.judge.problem
        sent = self._dispatcher.sent(
            look.judge,
            now,
            placed,
            horizon_s=_horizon_s(problem),
        )
        told = decision(
            replace(look, judge=sent.judge),
            chosen=sent.candidate if chosen is None or chosen is now else chosen,
            now=sent.candidate,
            placed=sent.placed,
            kept=sent.candidate if kept is now else kept,
            refused=refused,
            switch=switch,
        )
        lost = len(problem.in_force.replicas) - len(placed.replicas)
        reason = [why, sent.words, *notes(look), placed.reason]
        if sent.stays:
            return Planned(plan=problem.in_force, reason=_joined(reason), decision=told)
        if kept is now:
            reason[1:1] = [f"{lost} replicas lost" if lost else "new weights"]
        answer = planned(
            placed.replicas,
            weights(sent.judge.table, sent.placed, sent.candidate.shares),
            reason=_joined(reason),
            dropped=placed.dropped,
        )
        return replace(answer, decision=told)


def _horizon_s(problem: Problem) -> float:
    return max((model.horizon_s for model in problem.models), default=0.0) or HORIZON_S


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)
