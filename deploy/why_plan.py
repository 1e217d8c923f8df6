"""Why the plan in force is in force, and how what it was made for compares with what came.

A plan may differ from the one before in its routing weights alone. Then the replicas stand for
longer than the plan is in force, and the figures are those of the newest decision that led to
these replicas and has any. A plan that was made without figures (the first one, before anything is
expected) is explained by those with which it was first kept.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploy.journal import Journal, Past
from deploy.why_answers import PlanAnswer, SwitchSeen
from deploy.why_types import compared, covered_s, windows_since
from shared.messages.decisions import Decision
from shared.messages.demand import DemandReport
from shared.messages.plans import DeploymentPlan, PlanInForce, PlanProposed, ReplicaSpec

NO_FIGURES = (
    "no figures came with this decision, only a reason: other policies than 'oserve' give few or "
    "none, nor does that one before it has a forecast"
)
SETTLED_S = 60.0  # after a switch, what is seen is of these replicas alone
JOURNAL_LIMITS = "bus.journal_age_s_max and bus.journal_bytes_max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where figures come from: ``plan_id``, as it was proposed at ``at_s``, or kept then, for
    ``reason``. ``since_s``: from when on they may be compared with what is seen."""

    decision: Decision
    plan_id: str
    reason: str
    at_s: float
    since_s: float | None
    kept: bool = False


def why_plan(journal: Journal, in_force: PlanInForce) -> PlanAnswer:
    """The answer, from what the journal still has; what it lacks is said in the notes."""
    plan = in_force.plan
    own = next(
        (p for p in reversed(journal.proposed) if p.message.plan.plan_id == plan.plan_id), None
    )
    source = figures_of(journal, in_force)
    decision = source.decision if source else None
    since_s = put_in_force_at(journal, plan.plan_id)
    windows = windows_since(journal.demand, (source.since_s if source else None) or since_s)
    return PlanAnswer(
        now_s=journal.now_s,
        plan_id=plan.plan_id,
        epoch=in_force.epoch,
        plan=in_words(plan.replicas),
        reason=plan.reason,
        gpus=sum(len(spec.gpus) for spec in plan.replicas),
        pinned=plan.pinned,
        switching_to=in_force.switching_to,
        in_force_since_s=since_s,
        proposed_at_s=own.at_s if own else None,
        decided_by=source.plan_id if source else "",
        decided_at_s=source.at_s if source else None,
        decided_reason=source.reason if source else "",
        kept=source.kept if source else False,
        decision=decision,
        switch=switch_to(journal, source.plan_id if source else plan.plan_id),
        types=compared(decision.types if decision else (), windows),
        seen_s=max(covered_s(windows).values(), default=0.0),
        notes=tuple(_notes(journal, in_force, own, source, windows)),
    )


def figures_of(journal: Journal, in_force: PlanInForce) -> Source | None:
    """Of the plan in force, or of an earlier one with the same replicas; else those with which
    these replicas were first kept."""
    plan = in_force.plan
    line = _line(journal, plan)
    for past in line:
        decision, plan_id = past.message.decision, past.message.plan.plan_id
        if decision is not None and decision.types:
            since_s = put_in_force_at(journal, plan_id)
            return Source(
                decision=decision,
                plan_id=plan_id,
                reason=past.message.reason,
                at_s=past.at_s,
                since_s=since_s,
            )
    stood_since_s = line[-1].at_s if line else None
    for past in journal.kept:
        kept, at_s, decision = past.message, past.at_s, past.message.decision
        same = kept.epoch == in_force.epoch or (stood_since_s is not None and at_s > stood_since_s)
        if same and decision is not None and decision.types:
            return Source(
                decision=decision,
                plan_id=plan.plan_id,
                reason=kept.reason,
                at_s=at_s,
                since_s=at_s,
                kept=True,
            )
    return None


def _line(journal: Journal, plan: DeploymentPlan) -> list[Past[PlanProposed]]:
    """Proposals that came into force one after the other with the replicas of ``plan``, which is
    the newest of them, backwards."""
    line: list[Past[PlanProposed]] = []
    adopted = {past.message.plan_id for past in journal.ended if past.message.succeeded}
    for past in reversed(journal.proposed):
        event = past.message
        own = event.plan.plan_id == plan.plan_id
        if not (own or (line and event.plan.plan_id in adopted)):
            continue  # asked for later, or in vain
        if event.plan.replicas != plan.replicas:
            break
        line.append(past)
    return line


def put_in_force_at(journal: Journal, plan_id: str) -> float | None:
    """When the newest switch to the plan ended well."""
    for past in reversed(journal.ended):
        if past.message.plan_id == plan_id and past.message.succeeded:
            return past.at_s
    return None


def switch_to(journal: Journal, plan_id: str) -> SwitchSeen | None:
    """The newest switch to the plan, begun or ended."""
    began = next((p for p in reversed(journal.started) if p.message.plan_id == plan_id), None)
    ended = next((p for p in reversed(journal.ended) if p.message.plan_id == plan_id), None)
    if began is not None and ended is not None and began.message.epoch > ended.message.epoch:
        ended = None  # that was an earlier attempt
    if began is None and ended is None:
        return None
    return SwitchSeen(
        plan_id=plan_id,
        started_at_s=began.at_s if began else None,
        ended_at_s=ended.at_s if ended else None,
        took_s=ended.message.took_s if ended else None,
        succeeded=ended.message.succeeded if ended else False,
        detail=ended.message.detail if ended else "",
        stopping=began.message.replicas_stopping if began else (),
        starting=began.message.replicas_starting if began else (),
    )


def in_words(replicas: Iterable[ReplicaSpec]) -> str:
    """Such as ``2 x tp4, 4 x tp2``, the largest first; with the models where there are several."""
    specs = list(replicas)
    several = len({spec.model_id for spec in specs}) > 1
    counts = Counter((spec.model_id if several else "", spec.parallelism) for spec in specs)
    sizes = {(spec.model_id if several else "", spec.parallelism): len(spec.gpus) for spec in specs}
    ordered = sorted(counts, key=lambda key: (key[0], -sizes[key], key[1]))
    return ", ".join(
        f"{counts[key]} x {shape_in_words(key[1])}{f' of {key[0]}' if key[0] else ''}"
        for key in ordered
    )


def shape_in_words(parallelism: str) -> str:
    """``tp4`` for ``tp4pp1``."""
    return parallelism.removesuffix("pp1")


def _notes(
    journal: Journal,
    in_force: PlanInForce,
    own: Past[PlanProposed] | None,
    source: Source | None,
    windows: Sequence[DemandReport],
) -> Iterable[str]:
    plan, decision = in_force.plan, source.decision if source else None
    since_s = source.since_s if source and not source.kept else None
    if not plan.replicas:
        yield (
            "the plan in force is empty: nothing serves yet; the scheduler waits for workers, "
            "see `oserve status` and `oserve doctor`"
        )
        return
    if plan.pinned:
        yield "a person pinned this plan: the scheduler keeps to it until `oserve release`"
    yield from journal_notes(journal)
    if own is None and decision is None and not journal.empty:
        yield (
            f"the proposal of {plan.plan_id} is not in the journal any more, so its inputs and "
            f"alternatives are not known: {JOURNAL_LIMITS} say how long it keeps"
        )
    elif own is not None and decision is None and not plan.pinned:
        yield NO_FIGURES
    if decision is not None and not windows:
        yield (
            "no demand was reported since these replicas are in force: what is predicted has "
            "nothing to be compared with before profiler.window_s has passed"
        )

    elif windows and since_s is not None and journal.now_s - since_s < SETTLED_S:
        yield (
            "the replicas are new: what was seen includes requests that waited for them or began "
            "on others"
        )


def journal_notes(journal: Journal) -> Iterable[str]:
    """What holds for every question."""
    if journal.empty:
        yield (
            "the journal is empty: the mesh has decided nothing, or its events are older than "
            f"{JOURNAL_LIMITS} allow"
        )
    if journal.unreadable:
        yield (
            f"{journal.unreadable} events of the journal were written by another version of the "
            "mesh and cannot be read"
        )
