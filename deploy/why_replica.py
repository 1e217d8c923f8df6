"""Why a replica has its shape, its GPUs and its share, how loaded it is, and what befell it."""

from collections.abc import Iterable, Sequence

from deploy.journal import Journal, Past, ReplicaEvent
from deploy.why_answers import ReplicaAnswer, ReplicaEventSeen
from deploy.why_plan import (
    NO_FIGURES,
    Source,
    figures_of,
    in_words,
    journal_notes,
    shape_in_words,
)
from shared.errors import ConfigInvalid
from shared.messages.decisions import Decision, ReplicaOutlook
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaStarted,
    ReplicaStopped,
)

EVENTS_MAX = 20  # shown, the newest
_SAME_S = 120.0  # GPUs of one replica that tell of one thing within this


def why_replica(journal: Journal, in_force: PlanInForce, replica_id: str) -> ReplicaAnswer:
    """Raises ConfigInvalid when neither plan, workers nor journal know the replica."""
    plan = in_force.plan
    spec = _spec(plan.replicas, replica_id)
    events = _events(journal.replica)
    known = spec or _last_known(journal, replica_id)
    if known is None and not events:
        names = ", ".join(sorted(other.replica_id for other in plan.replicas)) or "none"
        raise ConfigInvalid(
            field="replica", value=replica_id, remedy=f"the plan in force has: {names}"
        )
    source = figures_of(journal, in_force) if spec else None
    decision = source.decision if source else None
    load = journal.load
    workers = {report.worker_id: report for report in journal.status.workers}
    gpus = known.gpus if known else ()
    present = [workers[gpu] for gpu in gpus if gpu in workers]
    return ReplicaAnswer(
        now_s=journal.now_s,
        replica_id=replica_id,
        in_plan=spec is not None,
        model_id=known.model_id if known else "",
        parallelism=known.parallelism if known else "",
        gpus=gpus,
        kinds=tuple(dict.fromkeys(report.gpu.kind for report in present)),
        nodes=tuple(dict.fromkeys(report.node_id for report in present)),
        shares=_shares(plan, spec) if spec else {},
        phases={
            report.worker_id: hosted.phase
            for report in journal.status.workers
            for hosted in report.replicas
            if hosted.replica_id == replica_id
        },
        outlook=_outlook(decision, replica_id),
        load=load.report if load else None,
        listened_s=load.listened_s if load else 0.0,
        requests_rps=load.requests_rps if load else None,
        output_tokens_per_s=load.output_tokens_per_s if load else None,
        why=tuple(_why(plan, spec, source) if spec else _why_not(journal, replica_id)),
        events=tuple(events[-EVENTS_MAX:]),
        starts=sum(event.what == "started" for event in events),
        failures=sum(event.what == "failed" for event in events),
        notes=tuple(_notes(journal, spec, decision, pinned=plan.pinned)),
    )


def _spec(replicas: Iterable[ReplicaSpec], replica_id: str) -> ReplicaSpec | None:
    return next((spec for spec in replicas if spec.replica_id == replica_id), None)


def _last_known(journal: Journal, replica_id: str) -> ReplicaSpec | None:
    """As the newest plan that had it says."""
    for past in reversed(journal.proposed):
        spec = _spec(past.message.plan.replicas, replica_id)
        if spec is not None:
            return spec
    return None


def _shares(plan: DeploymentPlan, spec: ReplicaSpec) -> dict[str, float]:
    """By type, of the requests of its own model: a row is shared by all models."""
    mine = {other.replica_id for other in plan.replicas if other.model_id == spec.model_id}
    shares: dict[str, float] = {}
    for kind, row in sorted(plan.weights.items()):
        total = sum(share for replica_id, share in row.items() if replica_id in mine)
        if total > 0.0:
            shares[kind] = row.get(spec.replica_id, 0.0) / total
    return shares


def _outlook(decision: Decision | None, replica_id: str) -> ReplicaOutlook | None:
    replicas = decision.replicas if decision else ()
    return next((outlook for outlook in replicas if outlook.replica_id == replica_id), None)


def _events(events: Sequence[Past[ReplicaEvent]]) -> list[ReplicaEventSeen]:
    """One for what all GPUs of the replica told alike, in the order of the last of them."""
    seen: list[ReplicaEventSeen] = []
    for past in events:
        event, what = past.message, _what(past.message)
        detail = event.detail if isinstance(event, ReplicaFailed) else ""
        if isinstance(event, ReplicaDrained) and event.handed_back:
            detail = f"handed back requests: {event.handed_back}"
        same = seen[-1] if seen else None
        if (
            same is not None
            and (same.what, same.epoch) == (what, event.epoch)
            and event.worker_id not in same.gpus
            and past.at_s - same.began_at_s < _SAME_S
        ):
            seen[-1] = ReplicaEventSeen(
                at_s=past.at_s,
                began_at_s=same.began_at_s,
                what=what,
                epoch=event.epoch,
                gpus=tuple(sorted((*same.gpus, event.worker_id))),
                detail=same.detail or detail,
            )
        else:
            seen.append(
                ReplicaEventSeen(
                    at_s=past.at_s,
                    began_at_s=past.at_s,
                    what=what,
                    epoch=event.epoch,
                    gpus=(event.worker_id,),
                    detail=detail,
                )
            )
    return seen


def _what(event: ReplicaEvent) -> str:
    match event:
        case ReplicaStarted():
            return "started"
        case ReplicaDrained():
            return "drained"
        case ReplicaStopped():
            return "stopped"
        case ReplicaFailed():
            return "refused" if event.refused else "failed"


def _why(plan: DeploymentPlan, spec: ReplicaSpec, source: Source | None) -> Iterable[str]:
    """Sentences on its shape, from the decision that led to the replicas in force."""
    shape = shape_in_words(spec.parallelism)
    yield f"it is one of {in_words(plan.replicas)}: {source.reason if source else plan.reason}"
    if source is None:
        return
    decision = source.decision
    rates = _rates_by_shape(decision, spec.model_id)
    for kind in sorted({kind for found in rates.values() for kind in found}):
        per_gpu = {
            name: found[kind] for name, found in rates.items() if found.get(kind) is not None
        }
        if shape in per_gpu and len(per_gpu) > 1:
            others = ", ".join(
                f"{name} {rate:.3g}" for name, rate in per_gpu.items() if name != shape
            )
            yield (
                f"of type {kind} it could serve {per_gpu[shape]:.3g} requests/s per GPU; other "
                f"shapes of the plan: {others}"
            )
    for other in decision.alternatives:
        yield f"instead of {other.plan}: {other.why}"
    if decision.bottleneck:
        yield decision.bottleneck


def _rates_by_shape(decision: Decision, model_id: str) -> dict[str, dict[str, float]]:
    """For each shape of the plan, requests/s of each type per GPU."""
    return {
        shape_in_words(outlook.parallelism): {
            kind: rate / max(1, len(outlook.gpus)) for kind, rate in outlook.rates_rps.items()
        }
        for outlook in decision.replicas
        if outlook.model_id == model_id
    }


def _why_not(journal: Journal, replica_id: str) -> Iterable[str]:
    """Which plan left it out."""
    left_by = None
    for past in reversed(journal.proposed):
        if _spec(past.message.plan.replicas, replica_id) is not None:
            break
        left_by = past.message
    if left_by is not None:
        shapes = in_words(left_by.plan.replicas)
        yield f"{left_by.plan.plan_id} ({shapes}) left it out: {left_by.reason}"


def _notes(
    journal: Journal, spec: ReplicaSpec | None, decision: Decision | None, *, pinned: bool
) -> Iterable[str]:
    if spec is None:
        yield "it is not in the plan in force: `oserve why plan` tells what is"
    yield from journal_notes(journal)
    if spec is not None and decision is None and not pinned:
        yield NO_FIGURES
    if spec is not None and journal.load is None:
        yield (
            "it sent no report while it was listened to: its leader is starting, busy or gone, "
            "see `oserve status`"
        )
