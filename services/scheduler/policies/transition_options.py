"""Which plans a decision tries to go to, and what it makes sure of before it does."""

from collections import Counter
from dataclasses import replace

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.capacity_plan import Placed, place_counts
from services.scheduler.policies.decision import Look
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.joint_refine import keeps
from services.scheduler.policies.joint_terms import Terms
from services.scheduler.policies.transition_rehearsed import played
from services.scheduler.policies.transition_rules import GAIN_MIN, Verdict, ruled
from services.scheduler.policies.transition_verdict import Move

OTHERS_MAX = 3  # plans tried where there is no way to the best


def placed_of(look: Look, choice: Candidate) -> tuple[Candidate, Placed]:
    """Its replicas on GPUs, and itself, or what is left of it where not all found room."""
    placed = place_counts(look.judge.table, choice.counts, look.judge.problem.in_force)
    if placed.dropped and placed.counts:
        choice = look.judge.dispatched(placed.counts)
    return choice, placed


def options(look: Look, kept: Candidate, choice: Candidate) -> list[Candidate]:
    """The choice, and those that are worth going to if there is no way to it, the best first. What
    lacks nothing but speed is not left for another that lacks something else."""
    best: dict[frozenset[object], Candidate] = {}
    for candidate in look.found:
        key = frozenset[object](candidate.counts.items())
        best[key] = min(best.get(key, candidate), candidate, key=lambda each: each.lateness)
    best.pop(frozenset(choice.counts.items()), None)
    gains = [each for each in best.values() if each.lateness < (1 - GAIN_MIN) * kept.lateness]
    others = sorted(gains, key=lambda each: each.lateness)[:OTHERS_MAX]
    return [choice] if look.elastic else [choice, *others]


def confirmed(look: Look, move: Move, found: Verdict, *, held: str) -> tuple[Look, Move, Verdict]:
    """The verdict on what was played through: the same choice or a better one, to which there is a
    way."""
    for others in (look.found, ()):
        tried = played(
            look.judge, [*others, move.choice], move.kept, move.choice, elastic=look.elastic
        )
        same = Counter(tried.choice.counts) == Counter(move.choice.counts)
        placed = move.placed
        if not same:
            in_force = look.judge.problem.in_force
            placed = place_counts(look.judge.table, tried.choice.counts, in_force)
        seen = replace(move, kept=tried.kept, choice=tried.choice, placed=placed, scale=tried.scale)
        found = ruled(seen, held=held)
        if found.moves and not placed.dropped:
            return replace(look, played=tried), seen, found
        if same:
            break
    return look, move, replace(found, way=None)


def lacking_in(table: Table, kept: Candidate, choice: Candidate, terms: Terms) -> str:
    """What the operator asks of any plan that the choice has and those in force have not."""
    if keeps(table, kept.counts, terms) or not keeps(table, choice.counts, terms):
        return ""
    return "the replicas in force are too few" + (" to lose one" if terms.survive else "")
