"""A plan as tables for a terminal of 100 columns."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.planning import words
from loadgen.planning.answer import Answer, Change
from loadgen.planning.grid import Row, left, right, section, wide
from loadgen.report_table import share
from shared.messages.decisions import (
    PlanOutlook,
    ReplicaOutlook,
    SwitchOutlook,
    TypeOutlook,
)

REPLICAS_SHOWN = 24
"""Beyond, replicas that are alike in all that is shown share a line."""

_NO_PLAN = {
    "headroom": "no plan carries more than {:.4g} x the p90 of the demand",
    "served": "no plan serves more than {:.4g} requests/s of it",
    "thrift": "no plan that carries the demand uses fewer than {:.4g} GPUs",
    "price": "no plan that carries the demand costs less than {:.4g} per hour",
}
_CHANGES: dict[Change, str] = {
    "new": "",
    "replicas": "",
    "none": "; that is in force already",
    "weights": "; the replicas in force, with other weights",
}


def plan_tables(answer: Answer) -> RenderableType:
    """The plan, what it is worth, what it cannot do."""
    parts: list[RenderableType] = [_headline(answer)]
    decision = answer.decision
    if decision.replicas:
        parts += _replicas(answer)
    if decision.types:
        parts += _types(answer)
    if answer.missing or answer.notes:
        parts.append("")
    parts += [Text(f"Missing: {text}", style="red") for text in answer.missing]
    parts += [Text(f"Note: {text}") for text in answer.notes]
    return Group(*parts)


def figures(outlook: PlanOutlook) -> str:
    """Headroom, tails and goodput of a plan. Plans are made for the 90th percentile of demand."""
    parts = [f"carries {words.times(outlook.headroom)} the p90 of the demand"]
    if outlook.goodput_share is not None:
        parts.append(f"{share(outlook.goodput_share)} of requests within targets")
    if outlook.e2e_s_p99 is not None:
        parts.append(f"E2E p99 {words.seconds(outlook.e2e_s_p99)} s")
    parts.append(f"p99 of TTFT and TPOT at {words.percent(outlook.lateness)} of targets")
    return ", ".join(parts)


def proof(answer: Answer) -> str:
    """How far from the best the plan may be, and what finding it took."""
    decision = answer.decision
    time = f"{decision.solve_s or answer.took_s:.2f} s"
    if decision.objective is None or decision.gap is None:
        return f"no bound was worked out in {time}"
    goal = "price" if decision.goal == "thrift" and answer.priced else decision.goal
    bound = decision.objective if decision.bound is None else decision.bound
    limit = _NO_PLAN.get(goal, "no plan is better than {:.4g}").format(bound)
    limit = f"with one replica lost, {limit}" if answer.survive else limit
    gap = f"gap {100 * decision.gap:.2f} %"
    if decision.optimal:
        return f"{limit}: proven in {time}, {gap}"
    return f"{limit}; {decision.objective:.4g} was found in {time}, {gap}"


def _headline(answer: Answer) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _summary(answer):
        table.add_row(name, Text(text))
    return table


def _summary(answer: Answer) -> list[tuple[str, str]]:
    decision, chosen = answer.decision, answer.decision.chosen
    rows = [
        ("demand", f"{answer.demand}: {_offered(answer)}"),
        ("targets", _targets(answer)),
        ("machines", f"{answer.gpus}; {answer.topology}"),
    ]
    if chosen is None or answer.plan is None:
        return [*rows, ("plan", "none")]
    gpus = sum(len(spec.gpus) for spec in answer.plan.replicas)
    price = f"{answer.price_per_hour:,.2f} per hour"
    rows.append(("plan", f"{answer.brief}, on {gpus} GPUs for {price}{_CHANGES[answer.change]}"))
    if chosen.plan != answer.brief:
        rows.append(("on the way to", chosen.plan))
    rows.append(("figures", figures(chosen)))
    rows.append(("proof", proof(answer)))
    if decision.in_force is not None and answer.change == "replicas":
        rows.append(("in force", f"{decision.in_force.plan}: {figures(decision.in_force)}"))
    if decision.switch is not None:
        rows.append(("switch", _switch(decision.switch)))
    return rows


def _offered(answer: Answer) -> str:
    types = f"{len(answer.types)} type{'s' if len(answer.types) > 1 else ''}"
    total = words.rate(answer.arrivals_rps)
    return f"{total} requests/s of {types}, for {answer.horizon_s:,.0f} s"


def _targets(answer: Answer) -> str:
    return "; ".join(
        f"{name}: TTFT {1000 * target.ttft_s:,g} ms, TPOT {1000 * target.tpot_s:,g} ms"
        for name, target in answer.targets.items()
    )


def _switch(switch: SwitchOutlook) -> str:
    verdict = "pays" if switch.moves else "does not pay"
    served = share(switch.served_share)
    moved = f"{switch.bytes_moved / 1e9:,.0f} GB"
    parts = [
        f"{verdict}: takes {switch.seconds:.0f} s, {served} of the demand is served meanwhile",
        f"{moved} are moved, {switch.busiest_link_s:.0f} s of it over the busiest link",
        f"{switch.requests_paused:,.0f} requests are paused",
        f"gain {words.rate(switch.gain)} s of lateness, cost {words.rate(switch.cost)} s",
    ]
    if switch.horizon_s:
        parts.append(f"the forecast is trusted for {switch.horizon_s:,.0f} s")
    if switch.payback_s is not None:
        parts.append(f"paid back after {switch.payback_s:,.0f} s")
    parts += [text for text in (switch.step, switch.why) if text and text not in verdict]
    return "; ".join(parts)


def _replicas(answer: Answer) -> list[RenderableType]:
    replicas = answer.decision.replicas
    title = "Replicas: what each is sent, in requests/s, and predicted times, in ms at p50 / p99"
    told, there = len(replicas), len(answer.plan.replicas) if answer.plan else 0
    if told < there:
        title += f"; {told} of {there}, the others are in the plan file (--out)"
    columns = (*wide("replica"), *left("shape"), *wide("GPUs", "sent"))
    columns += right("busy", "TTFT", "TPOT")
    rows: list[Row] = []
    for group in _alike(answer, replicas):
        first = group[0]
        name, gpus = first.replica_id, words.gpus(first.gpus)
        if len(group) > 1:
            name = f"{len(group)} x {first.model_id}"
            gpus = f"{sum(len(one.gpus) for one in group)}: {gpus} ..."
        rows.append(
            Row(
                cells=(name, words.shape(first.parallelism), gpus, *_figures(answer, first)),
                style="red" if first.utilisation > 1.0 else "",
            )
        )
    return section(title, columns, rows)


def _alike(answer: Answer, replicas: Sequence[ReplicaOutlook]) -> list[list[ReplicaOutlook]]:
    """Each alone while there are few; else those that differ in id and GPUs only, together."""
    groups: dict[object, list[ReplicaOutlook]] = {}
    for one in replicas:
        key: object = one.replica_id
        if len(replicas) > REPLICAS_SHOWN:
            key = (one.model_id, one.parallelism, _figures(answer, one))
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _figures(answer: Answer, one: ReplicaOutlook) -> tuple[str, ...]:
    sent = (
        (answer.type_name(one.model_id, number), value)
        for number, value in sorted(one.arrivals_rps.items())
        if value > 0.0
    )
    return (
        words.counted(sent),
        words.percent(one.utilisation),
        words.pair(one.ttft_s_p50, one.ttft_s_p99),
        words.pair(one.tpot_s_p50, one.tpot_s_p99),
    )


def _types(answer: Answer) -> list[RenderableType]:
    """A table for each model."""
    models = list(dict.fromkeys(kind.model_id for kind in answer.decision.types))
    columns = (
        *wide("type"),
        *right("arrivals", "p10-p90", "tokens", "TTFT", "TPOT", "E2E p99, s", "in time"),
    )
    parts: list[RenderableType] = []
    for model_id in models:
        of = f" of {model_id}" if len(models) > 1 else ""
        title = f"Types{of}: requests/s, mean tokens in / out, predicted times in ms at p50 / p99"
        own = [kind for kind in answer.decision.types if kind.model_id == model_id]
        parts += section(title, columns, [_type(answer, kind) for kind in own])
    return parts


def _type(answer: Answer, kind: TypeOutlook) -> Row:
    return Row(
        cells=(
            answer.type_name(kind.model_id, kind.request_type),
            words.rate(kind.arrivals_rps),
            _range(kind),
            f"{kind.input_tokens:,.0f} / {kind.output_tokens:,.0f}",
            words.pair(kind.ttft_s_p50, kind.ttft_s_p99),
            words.pair(kind.tpot_s_p50, kind.tpot_s_p99),
            words.seconds(kind.e2e_s_p99),
            share(kind.goodput_share),
        )
    )


def _range(kind: TypeOutlook) -> str:
    low, high = kind.arrivals_rps_p10, kind.arrivals_rps_p90
    return words.NOTHING if low == high else f"{words.rate(low)}-{words.rate(high)}"
