"""The answers of ``oserve why`` for a terminal: a headline, figures, and what is not known."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.why_answers import KeptAnswer, PlanAnswer, ReplicaAnswer, SwitchSeen
from deploy.why_figures import (
    lost_lines,
    number,
    plans_table,
    share,
    solved_line,
    switch_lines,
    table,
    time_text,
    types_table,
    when,
)
from deploy.why_plan import shape_in_words
from shared.messages.decisions import Decision

_GPUS_SHOWN = 4


def plan_view(answer: PlanAnswer) -> RenderableType:
    now_s = answer.now_s
    pinned = ", pinned" if answer.pinned else ""
    parts: list[RenderableType] = [
        Text(f"Plan {answer.plan_id or '(empty)'}, epoch {answer.epoch}{pinned}", style="bold"),
        *_lines(
            f"{answer.plan or 'no replicas'}, {answer.gpus} GPUs, "
            f"in force since {when(answer.in_force_since_s, now_s)}",
            f"why: {answer.reason}" if answer.reason else "",
            f"switching to {answer.switching_to}: `oserve why not-switching`"
            if answer.switching_to
            else "",
            *_proposed(answer),
            _switch_seen(answer.switch, answer.decision),
        ),
    ]
    if answer.types:
        parts.append(types_table(answer.types, seen_s=answer.seen_s))
    if answer.decision is not None:
        then = "in force" if answer.kept else "in force then"
        parts += _decision(answer.decision, chosen="chosen", in_force=then)
    return Group(*parts, *_notes(answer.notes))


def _proposed(answer: PlanAnswer) -> Iterable[str]:
    now_s = answer.now_s
    if answer.proposed_at_s is not None:
        yield f"proposed {when(answer.proposed_at_s, now_s)}"
    if answer.kept:
        kept = when(answer.decided_at_s, now_s)
        yield f"figures: those with which it was first kept, {kept}: {answer.decided_reason}"
    elif answer.decided_by and answer.decided_by != answer.plan_id:
        yield (
            f"figures: those of {answer.decided_by}, which brought the replicas, of "
            f"{when(answer.decided_at_s, now_s)}: {answer.decided_reason}"
        )


def _switch_seen(switch: SwitchSeen | None, decision: Decision | None) -> str:
    if switch is None or switch.took_s is None:
        return ""
    outlook = decision.switch if decision else None
    expected = f" ({time_text(outlook.seconds)} expected)" if outlook and outlook.moves else ""
    changes = [
        f"{what} {', '.join(names)}"
        for what, names in (("stopped", switch.stopping), ("started", switch.starting))
        if names
    ]
    return f"the switch took {time_text(switch.took_s)}{expected}: " + (
        "; ".join(changes) or "no replica changed, only weights"
    )


def kept_view(answer: KeptAnswer) -> RenderableType:
    now_s = answer.now_s
    stays = f"Nothing moves: {answer.plan or 'no replicas'} stays"
    headline = f"About to move: {answer.moving}" if answer.moving else stays
    decided = ""
    if answer.decided_at_s is not None:
        decided = (
            f"decided {when(answer.decided_at_s, now_s)}; nothing was asked for since "
            f"{when(answer.kept_since_s, now_s)}"
        )
    parts: list[RenderableType] = [
        Text(headline, style="bold"),
        *_lines(
            f"in force: {answer.plan_id or '(empty)'}, epoch {answer.epoch}: "
            f"{answer.plan or 'no replicas'}, since {when(answer.in_force_since_s, now_s)}",
            decided,
            f"why: {answer.reason}" if answer.reason else "",
        ),
    ]
    if answer.decision is not None:
        parts += _decision(answer.decision, chosen="best found", in_force="in force")
    if answer.would_change:
        parts.append(Text("What would have to change", style="bold"))
        parts += _lines(*answer.would_change, bullet="- ")
    return Group(*parts, *_notes(answer.notes))


def replica_view(answer: ReplicaAnswer) -> RenderableType:
    shape = shape_in_words(answer.parallelism) or "unknown shape"
    where = f" on {', '.join(answer.kinds)} of {', '.join(answer.nodes)}" if answer.kinds else ""
    lost = "" if answer.in_plan else ", not in the plan in force"
    parts: list[RenderableType] = [
        Text(f"Replica {answer.replica_id}: {shape} of {answer.model_id}{lost}", style="bold"),
        *_lines(
            f"GPUs {_gpus(answer.gpus)}{where}" if answer.gpus else "",
            "; ".join(f"{gpu} is {phase}" for gpu, phase in _unusual(answer)),
        ),
    ]
    if answer.shares:
        parts.append(_shares_table(answer))
    if answer.outlook is not None or answer.load is not None:
        parts += _load(answer)
    if answer.why:
        parts.append(Text("Why this shape" if answer.in_plan else "Why it is gone", style="bold"))
        parts += _lines(*answer.why, bullet="- ")
    if answer.events:
        title = f"Events in the journal (starts: {answer.starts}, failures: {answer.failures})"
        rows = table(title, "when", "what", "GPUs", "detail", left=4)
        for event in answer.events:
            what = f"{event.what}, epoch {event.epoch}"
            rows.add_row(when(event.at_s, answer.now_s), what, _gpus(event.gpus), event.detail)
        parts.append(rows)
    return Group(*parts, *_notes(answer.notes))


def _unusual(answer: ReplicaAnswer) -> Iterable[tuple[str, str]]:
    return ((gpu, phase) for gpu, phase in answer.phases.items() if phase != "serving")


def _gpus(gpus: tuple[str, ...]) -> str:
    if len(gpus) <= _GPUS_SHOWN:
        return ", ".join(gpus)
    return f"{gpus[0]} to {gpus[-1]} ({len(gpus)})"


def _shares_table(answer: ReplicaAnswer) -> Table:
    outlook = answer.outlook
    columns = ("type", "share of its requests", "expected requests/s", "could serve alone")
    rows = table("Requests that it is sent", *columns)
    for kind, part in answer.shares.items():
        sent = outlook.arrivals_rps.get(kind) if outlook else None
        alone = outlook.rates_rps.get(kind) if outlook else None
        name = "* (all others)" if kind == "*" else kind
        rows.add_row(name, share(part), number(sent), number(alone))
    return rows


def _load(answer: ReplicaAnswer) -> list[RenderableType]:
    """Predicted beside present, as far as the two speak of the same."""
    outlook, load = answer.outlook, answer.load
    rows = table("Load", "", "predicted", "now")
    expected_rps = sum(outlook.arrivals_rps.values()) if outlook else None
    rows.add_row("requests/s", number(expected_rps), number(answer.requests_rps))
    rows.add_row("utilisation", share(outlook.utilisation if outlook else None), "")
    if outlook is not None:
        for name, p50, p99 in (
            ("TTFT p50, p99", outlook.ttft_s_p50, outlook.ttft_s_p99),
            ("TPOT p50, p99", outlook.tpot_s_p50, outlook.tpot_s_p99),
        ):
            if p50 is not None or p99 is not None:
                rows.add_row(name, f"{time_text(p50)}, {time_text(p99)}", "")
    if load is not None:
        kv = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else None
        rows.add_row("output tokens/s", "", number(answer.output_tokens_per_s))
        rows.add_row("running", "", f"{load.running} of {load.running_max}")
        rows.add_row("waiting", "", f"{load.waiting} of {load.waiting_max}")
        rows.add_row("KV blocks", "", share(kv))
        rows.add_row("step", "", time_text(load.step_s))
        listened = f"now: rates over {answer.listened_s:.1f} s, the rest as last reported"
        return [rows, Text(listened, style="dim")]
    return [rows]


def _decision(decision: Decision, *, chosen: str, in_force: str) -> list[RenderableType]:
    parts: list[RenderableType] = []
    plans = plans_table(decision, chosen=chosen, in_force=in_force)
    if plans is not None:
        parts.append(plans)
    lost = lost_lines(decision)
    if lost:
        parts += [Text("Why the others lost", style="bold"), *_lines(*lost, bullet="- ")]
    if decision.switch is not None:
        parts += _lines(*switch_lines(decision.switch))
    parts += _lines(
        decision.bottleneck,
        *decision.advice,
        *(f"missing: {text}" for text in decision.missing),
        solved_line(decision),
    )
    return parts


def _lines(*texts: str, bullet: str = "") -> list[RenderableType]:
    return [Text(f"{bullet}{text}") for text in texts if text]


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return _lines(*notes, bullet="Note: ")
