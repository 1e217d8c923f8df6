"""Why the plan in force is in force, and how what it was made for compares with what came.

A plan may differ from the one before in its routing weights alone. Then the replicas stand for
longer than the plan is in force, and the figures are those of the newest decision that led to
these replicas and has any. A plan that was made without figures (the first one, before anything is
expected) is explained by those with which it was first kept.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deploy.journal import Journal, Past
from deploy.why_answers import Figures, PlanAnswer, SwitchSeen, TypeCompared
from shared.messages.decisions import Decision, TypeOutlook
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import DeploymentPlan, PlanInForce, PlanProposed, ReplicaSpec

NO_FIGURES = (
    "no figures came with this decision, only a reason: no policy but 'oserve' gives any, nor does "
    "that one before it has a forecast"
)
JOURNAL_LIMITS = "bus.journal_age_s_max and bus.journal_bytes_max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where figures come from: ``plan_id``, as it was proposed at ``at_s``, or kept then.
    ``since_s``: from when on they may be compared with what is seen."""

    decision: Decision
    plan_id: str
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
    windows = _windows(journal.demand, (source.since_s if source else None) or since_s)
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
        kept=source.kept if source else False,
        decision=decision,
        switch=switch_to(journal, plan.plan_id),
        types=compared(decision.types if decision else (), windows),
        seen_s=max(_covered_s(windows).values(), default=0.0),
        notes=tuple(_notes(journal, in_force, own, decision, windows)),
    )


def figures_of(journal: Journal, in_force: PlanInForce) -> Source | None:
    """Of the plan in force, or of an earlier one with the same replicas; else those with which the
    plan in force was first kept."""
    plan = in_force.plan
    past = _proposal_with_figures(journal, plan)
    if past is not None and past.message.decision is not None:
        plan_id = past.message.plan.plan_id
        since_s = put_in_force_at(journal, plan_id)
        return Source(
            decision=past.message.decision, plan_id=plan_id, at_s=past.at_s, since_s=since_s
        )
    for kept in journal.kept:
        decision = kept.message.decision
        if kept.message.epoch == in_force.epoch and decision is not None and decision.types:
            return Source(
                decision=decision,
                plan_id=plan.plan_id,
                at_s=kept.at_s,
                since_s=kept.at_s,
                kept=True,
            )
    return None


def _proposal_with_figures(journal: Journal, plan: DeploymentPlan) -> Past[PlanProposed] | None:
    """The newest proposal of these replicas with predictions, from the plan in force backwards."""
    found = False
    for past in reversed(journal.proposed):
        event = past.message
        found = found or event.plan.plan_id == plan.plan_id
        if not found:
            continue  # asked for later, and not in force
        if event.plan.replicas != plan.replicas:
            return None
        if event.decision is not None and event.decision.types:
            return past
    return None


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


@dataclass(slots=True)
class _Sums:
    """Of one type over all windows; times are weighted by the requests behind them."""

    requests: int = 0
    arrivals: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    ttft_s: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    tpot_s: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def add(self, demand: TypeDemand, window_s: float) -> None:
        self.requests += demand.requests
        self.arrivals += demand.arrivals_rps * window_s
        self.input_tokens += demand.input_tokens_mean * demand.requests
        self.output_tokens += demand.output_tokens_mean * demand.requests
        if demand.ttft_s_mean is not None:
            self.ttft_s.append((demand.ttft_s_mean, demand.requests))
        if demand.tpot_s_mean is not None:
            self.tpot_s.append((demand.tpot_s_mean, demand.requests))

    def figures(self, covered_s: float) -> Figures | None:
        if not self.requests:
            return None
        return Figures(
            arrivals_rps=self.arrivals / covered_s,
            input_tokens=self.input_tokens / self.requests,
            output_tokens=self.output_tokens / self.requests,
            ttft_s_mean=_mean(self.ttft_s),
            tpot_s_mean=_mean(self.tpot_s),
        )


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None


def _windows(demand: Iterable[Past[DemandReport]], since_s: float | None) -> list[DemandReport]:
    """Windows that began after ``since_s``: one that began before mixes two plans."""
    if since_s is None:
        return []
    return [past.message for past in demand if past.message.window_start_s >= since_s]


def _covered_s(windows: Iterable[DemandReport]) -> dict[str, float]:
    """By model, for how long it was seen."""
    covered_s: dict[str, float] = {}
    for window in windows:
        covered_s[window.model_id] = covered_s.get(window.model_id, 0.0) + window.window_s
    return covered_s


def compared(
    outlooks: Iterable[TypeOutlook], windows: Sequence[DemandReport]
) -> tuple[TypeCompared, ...]:
    """Each type that was expected or seen."""
    sums: dict[tuple[str, str], _Sums] = {}
    covered_s = _covered_s(windows)
    for window in windows:
        for demand in window.types:
            key = window.model_id, str(demand.request_type)
            sums.setdefault(key, _Sums()).add(demand, window.window_s)
    expected = {(outlook.model_id, outlook.request_type): outlook for outlook in outlooks}
    found: list[TypeCompared] = []
    for key in sorted(expected.keys() | {key for key in sums if sums[key].requests}):
        outlook, seen = expected.get(key), sums.get(key)
        found.append(
            TypeCompared(
                model_id=key[0],
                request_type=key[1],
                predicted=_predicted(outlook) if outlook else None,
                seen=seen.figures(covered_s[key[0]]) if seen else None,
                requests=seen.requests if seen else 0,
                arrivals_rps_p10=outlook.arrivals_rps_p10 if outlook else None,
                arrivals_rps_p90=outlook.arrivals_rps_p90 if outlook else None,
            )
        )
    return tuple(found)


def _predicted(outlook: TypeOutlook) -> Figures:
    return Figures(
        arrivals_rps=outlook.arrivals_rps,
        input_tokens=outlook.input_tokens,
        output_tokens=outlook.output_tokens,
        ttft_s_mean=outlook.ttft_s_mean,
        tpot_s_mean=outlook.tpot_s_mean,
    )


def _notes(
    journal: Journal,
    in_force: PlanInForce,
    own: Past[PlanProposed] | None,
    decision: Decision | None,
    windows: Sequence[DemandReport],
) -> Iterable[str]:
    plan = in_force.plan
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
