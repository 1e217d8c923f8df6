"""Why the mesh does not change its plan, or that it is about to."""

from collections.abc import Iterable

from deploy.journal import Journal, Past
from deploy.why_answers import KeptAnswer
from deploy.why_figures import lasting
from deploy.why_plan import NO_FIGURES, in_words, journal_notes, put_in_force_at, switch_to
from shared.messages.decisions import Decision, SwitchOutlook
from shared.messages.plans import PlanInForce, PlanKept, PlanProposed


def why_not_switching(journal: Journal, in_force: PlanInForce) -> KeptAnswer:
    """The newest decision to keep, unless a newer one is to move."""
    plan = in_force.plan
    proposed = journal.proposed[-1] if journal.proposed else None
    row = _kept_in_a_row(journal.kept, proposed)
    last = row[-1].message if row else None
    decision = last.decision if last else None
    moving = _moving(journal, in_force, proposed, kept=bool(row))
    return KeptAnswer(
        now_s=journal.now_s,
        plan_id=plan.plan_id,
        epoch=in_force.epoch,
        plan=in_words(plan.replicas),
        pinned=plan.pinned,
        in_force_since_s=put_in_force_at(journal, plan.plan_id),
        moving=moving,
        reason=last.reason if last else "",
        decided_at_s=row[-1].at_s if row else None,
        kept_since_s=row[0].at_s if row else None,
        times=len(row),
        decision=decision,
        would_change=tuple(_would_change(decision)) if decision and not plan.pinned else (),
        notes=tuple(_notes(journal, in_force, last, moving=moving)),
    )


def _kept_in_a_row(
    kept: tuple[Past[PlanKept], ...], proposed: Past[PlanProposed] | None
) -> list[Past[PlanKept]]:
    """Decisions to keep since the last one to move."""
    return [past for past in kept if proposed is None or past.at_s > proposed.at_s]


def _moving(
    journal: Journal, in_force: PlanInForce, proposed: Past[PlanProposed] | None, *, kept: bool
) -> str:
    """In words, when the scheduler wants another plan; "" when it does not."""
    if in_force.switching_to:
        target = in_force.switching_to
        asked = next(
            (p for p in reversed(journal.proposed) if p.message.plan.plan_id == target), None
        )
        shapes = f" ({in_words(asked.message.plan.replicas)})" if asked else ""
        return f"a switch to {target}{shapes} is under way"
    if proposed is None or kept or proposed.message.plan.plan_id == in_force.plan.plan_id:
        return ""
    wanted = proposed.message.plan
    text = f"the scheduler asks for {wanted.plan_id} ({in_words(wanted.replicas)})"
    tried = switch_to(journal, wanted.plan_id)
    if tried is not None and tried.ended_at_s is not None and not tried.succeeded:
        return f"{text}, but the last switch to it was rolled back: {tried.detail}"
    return f"{text}, and the switch to it has not begun"


def _would_change(decision: Decision) -> Iterable[str]:
    """What would have to be different for the replicas to change, by the figures alone."""
    in_force, switch = decision.in_force, decision.switch
    if switch is not None and not switch.moves:
        yield from _worth_it(switch)
    elif in_force is not None:
        yield (
            "the replicas in force are the best that was found, so another demand: other types, "
            "lengths or rates than those expected"
        )
        others = [other for other in decision.alternatives if other.plan != in_force.plan]
        if others:
            nearest = min(others, key=lambda other: other.lateness)
            yield (
                f"the next best, {nearest.plan}, would have to be less late than "
                f"{in_force.lateness:.3g}; it is predicted at {nearest.lateness:.3g}"
            )
    for missing in decision.missing:
        yield f"what is missing: {missing}"


def _worth_it(switch: SwitchOutlook) -> Iterable[str]:
    if switch.gain <= 0.0:
        yield "the best plan found would have to promise less lateness than the one in force"
        return
    if switch.gain > switch.cost:
        yield f"its gain exceeds its cost already; what holds the switch back: {switch.why}"
        return
    if switch.why:
        yield f"what is said against the switch must hold no more: {switch.why}"
    times = switch.cost / switch.gain
    yield (
        f"a gain in lateness {times:.2g} times as large, by a demand that suits the replicas in "
        "force less"
    )
    if switch.seconds > 0.0:
        yield (
            f"or a cheaper switch: one of about {lasting(switch.seconds / times)} instead of "
            f"{lasting(switch.seconds)} at the same loss"
        )
    if switch.payback_s is not None and switch.payback_s > switch.horizon_s > 0.0:
        yield (
            f"or a demand that is expected to last {lasting(switch.payback_s)} instead of "
            f"{lasting(switch.horizon_s)}"
        )
    if switch.served_share < 1.0:
        yield (
            f"or replicas that stay and serve meanwhile: {100 * switch.served_share:.0f} % of the "
            "demand is served while it lasts"
        )


def _notes(
    journal: Journal, in_force: PlanInForce, last: PlanKept | None, *, moving: str
) -> Iterable[str]:
    if in_force.plan.pinned:
        yield "a person pinned the plan in force: `oserve release` lets the scheduler plan again"
    yield from journal_notes(journal)
    if last is None and not moving and not journal.empty:
        yield (
            "no decision to keep the plan is in the journal since it was asked for: the policy "
            "has not decided again (scheduler.policy_period_s), or its decisions are too old"
        )
    elif last is not None and last.decision is None and not in_force.plan.pinned:
        yield NO_FIGURES
