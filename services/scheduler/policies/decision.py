"""The figures of one decision, as ``shared/messages/decisions.py`` has them.

How requests should fare is what was seen when the plan was played through under the usual demand
(``rehearsal``); capacity (``headroom``) is told of the high one, which plans are made for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.horizon import Foreseen
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.insight import bottlenecks, one_more
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.joint_terms import Solution, Terms
from services.scheduler.policies.minimums import left_out
from services.scheduler.policies.rehearsal_choice import outlook, rehearsed
from services.scheduler.policies.rehearsal_outlook import replica_outlooks, type_outlooks
from services.scheduler.policies.transition_rehearsed import Tried
from shared.messages.decisions import (
    ALTERNATIVES_MAX,
    Decision,
    PlanOutlook,
    SwitchOutlook,
)

ADVICE_S = 2.0  # for all its programs together
NOTHING = 1e-9  # times the demand: a solver's zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one decision saw. ``shortcomings``: of what is on offer; ``best``: how much fits at all,
    keeping ``terms``; ``found``: plans compared; ``lasts_s``: for how long they are expected to
    last; ``played``: the best of them, rehearsed."""

    judge: Weighed
    foreseen: Foreseen
    shortcomings: str
    best: Solution | None
    terms: Terms
    lasts_s: float
    found: Sequence[Candidate] = ()
    played: Tried | None = None

    @property
    def elastic(self) -> bool:
        """Whether GPUs may be left unused, and need not all be used."""
        return self.best is not None and self.best.goal == "thrift"


def decision(  # noqa: PLR0913  # what a decision is
    look: Look,
    *,
    chosen: Candidate,
    now: Candidate,
    placed: Placed,
    kept: Candidate | None = None,
    refused: Candidate | None = None,
    switch: SwitchOutlook | None = None,
) -> Decision:
    """``chosen``: what it leads to; ``now``: the plan that is asked for, a step on the way there,
    or the one in force; ``refused``: better, and not worth going to."""
    judge, best = look.judge, look.best
    seen = rehearsed(judge.usual, [now], keep=1).outcome
    gap = best.gap if best and isfinite(best.gap) else None
    return Decision(
        policy="oserve",
        goal=best.goal if best else "",
        objective=best.objective if best else None,
        bound=best.bound if best and isfinite(best.bound) else None,
        gap=gap,
        optimal=best.optimal if best else False,
        horizon_s=look.lasts_s,
        types=type_outlooks(judge.usual.table, seen, look.foreseen.between),
        replicas=replica_outlooks(judge.usual.table, placed, now, seen),
        chosen=outlook(chosen, _why_chosen(chosen, kept, switch), seen if now is chosen else None),
        in_force=outlook(kept, "in force", seen if now is kept else None) if kept else None,
        alternatives=alternatives(look, chosen, refused, switch),
        switch=switch,
        bottleneck=bottlenecks(judge.usual.table, now.counts).in_words(),
        advice=advice(look),
        missing=missing(look),
    )


def advice(look: Look) -> tuple[str, ...]:
    """What more GPUs would bring, where those on offer do not suffice."""
    if look.best is None or not missing(look):
        return ()
    found = one_more(look.judge.table, look.best.goal, look.terms, look.best, time_limit_s=ADVICE_S)
    return tuple(each.in_words() for each in found)


def notes(look: Look) -> list[str]:
    """What is worth a word beside the verdict."""
    best, found = look.best, list[str]()
    if best is not None:
        what = {
            "headroom": "times the demand could be served",
            "served": "requests/s could be served",
        }
        least = f"at least {best.objective:.3g} per hour are needed"
        said = f"at most {best.objective:.3g} {what[best.goal]}" if best.goal in what else least
        proof = "proven best" if best.optimal else f"bound {best.bound:.3g}, time was up"
        found.append(f"{said} ({proof}); {len(look.found)} plans compared")
    return [*found, *missing(look), *look.foreseen.notes]


def _why_chosen(chosen: Candidate, kept: Candidate | None, switch: SwitchOutlook | None) -> str:
    if kept is None:
        return "nothing stands yet"
    if chosen is not kept:
        return "pays back" if switch and switch.payback_s is not None else "carries more or saves"
    return f"stays: {switch.why}" if switch and switch.why else "the best found"


def alternatives(
    look: Look, chosen: Candidate, refused: Candidate | None, switch: SwitchOutlook | None
) -> tuple[PlanOutlook, ...]:
    """The other plans that were compared, the best first, and what each lost by."""
    if look.played is not None and refused is None:
        return look.played.ranking.alternatives
    best: dict[tuple[tuple[Column, int], ...], Candidate] = {}
    for candidate in [*look.found, *([refused] if refused else [])]:
        key = _key(candidate)
        best[key] = min(best.get(key, candidate), candidate, key=lambda each: each.lateness)
    best.pop(_key(chosen), None)
    ranked = sorted(best.values(), key=lambda each: (each.lateness, -each.headroom))
    why = {_key(refused): f"not worth the switch: {switch.why}"} if refused and switch else {}
    return tuple(
        outlook(each, why.get(_key(each)) or lost_by(each, winner=refused or chosen))
        for each in ranked[:ALTERNATIVES_MAX]
    )


def _key(candidate: Candidate) -> tuple[tuple[Column, int], ...]:
    return tuple(sorted(candidate.counts.items()))


def lost_by(loser: Candidate, *, winner: Candidate) -> str:
    """In words."""
    if winner.headroom >= 1.0 > loser.headroom:
        return f"carries only {loser.headroom:.3g} times the demand"
    if loser.lateness > winner.lateness > 0.0:
        return f"its slowest 1 % are {loser.lateness / winner.lateness - 1.0:.0%} later"
    if loser.price > winner.price:
        return "costs more per hour, and the targets do not need it"
    if loser.headroom < winner.headroom:
        return f"about as late, and carries only {loser.headroom:.3g} times the demand"
    return "about as late"


def missing(look: Look) -> tuple[str, ...]:
    """What cannot be served, and what it would take; empty when nothing is missing."""
    table, best = look.judge.table, look.best
    found = [look.shortcomings]
    if best is not None:
        found.append(left_out(look.judge.problem, {column.model_id for column in best.counts}))
    if best is not None and best.goal == "served":
        share = best.objective / float(table.demand.sum())
        found.append(
            f"GPUs do not suffice to serve some of every type: {share:.0%} of the requests at most"
        )
    elif best is not None and best.goal == "headroom" and best.objective < 1.0:
        more = ceil(table.gpus() * (1.0 / max(NOTHING, best.objective) - 1.0))
        found.append(
            f"the GPUs carry {best.objective:.3g} times the demand: about {more} more like them "
            "would carry it"
        )
    return tuple(note for note in found if note)
