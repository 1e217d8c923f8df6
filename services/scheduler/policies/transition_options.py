"""Which plans a decision tries to go to, and on which GPUs."""

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.capacity_plan import Placed, place_counts
from services.scheduler.policies.decision import Look
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.joint_refine import keeps
from services.scheduler.policies.joint_terms import Terms
from services.scheduler.policies.transition_rehearsed import Tried
from services.scheduler.policies.transition_rules import GAIN_MIN

OTHERS_MAX = 3  # plans tried where there is no way to the best


def placed_of(look: Look, choice: Candidate) -> tuple[Candidate, Placed]:
    """Its replicas on GPUs, and itself, or what is left of it where not all found room."""
    placed = place_counts(look.judge.table, choice.counts, look.judge.problem.in_force)
    if placed.dropped and placed.counts:
        choice = look.judge.dispatched(placed.counts)
    return choice, placed


def options(tried: Tried) -> list[Candidate]:
    """The best of the plans that were played, and those that are worth going to if there is no way
    to it."""
    best, *others = tried.plans
    least = (1 - GAIN_MIN) * tried.kept.lateness
    return [best, *[each for each in others if each.lateness < least][:OTHERS_MAX]]


def lacking_in(table: Table, kept: Candidate, choice: Candidate, terms: Terms) -> str:
    """What the operator asks of any plan that the choice has and those in force have not."""
    if keeps(table, kept.counts, terms) or not keeps(table, choice.counts, terms):
        return ""
    return "the replicas in force are too few" + (" to lose one" if terms.survive else "")
