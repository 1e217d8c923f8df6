"""A plan as tables for a terminal of 100 columns."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.planning import words
from loadgen.planning.planner import Answer
from loadgen.planning.report import Report
from loadgen.report_table import share
from shared.messages.decisions import Decision, PlanOutlook, ReplicaOutlook, TypeOutlook

REPLICAS_SHOWN = 24
"""Beyond, replicas that are alike in all that is shown share a line."""

_OBJECTIVES = {
    "headroom": "any plan carries at most {:.4g} x the demand",
    "served": "any plan serves at most {:.4g} requests/s of it",
    "thrift": "no plan that carries it is cheaper than {:.4g} per hour",
}


def plan_tables(report: Report) -> RenderableType:
    """The plan, what it is worth, and what else was asked."""
    answer = report.answer
    parts: list[RenderableType] = [_headline(answer)]
    decision = answer.decision
    if decision.replicas:
        parts += ["", _replicas(answer)]
    if decision.types:
        parts += ["", _types(answer)]
    parts += _lines("Missing", answer.missing, style="red")
    parts += _lines("Note", answer.notes)
    return Group(*parts)


def _headline(answer: Answer) -> Table:
    table = Table(title="Plan", show_header=False, title_justify="left", show_lines=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _summary(answer):
        table.add_row(name, Text(text))
    return table


def _summary(answer: Answer) -> list[tuple[str, str]]:
    decision, chosen = answer.decision, answer.decision.chosen
    rows = [
        ("demand", answer.demand),
        ("targets", _targets(answer)),
        ("machines", f"{answer.gpus}; {answer.topology}"),
    ]
    if chosen is None or answer.plan is None:
        return [*rows, ("plan", "none")]
    rows.append(("plan", f"{chosen.plan}, on {chosen.gpus} GPUs"))
    rows.append(("worth", worth(chosen)))
    rows.append(("proof", proof(decision, answer.took_s)))
    if decision.in_force is not None:
        rows.append(("in force", f"{decision.in_force.plan}: {worth(decision.in_force)}"))
    if decision.switch is not None:
        rows.append(("switch", _switch(decision)))
    return rows


def _targets(answer: Answer) -> str:
    return "; ".join(
        f"{name}: TTFT {1000 * target.ttft_s:,g} ms, TPOT {1000 * target.tpot_s:,g} ms"
        for name, target in answer.targets.items()
    )


def worth(outlook: PlanOutlook) -> str:
    """Headroom, goodput, tails and price of a plan."""
    parts = [f"carries {words.times(outlook.headroom)} the demand"]
    if outlook.goodput_share is not None:
        parts.append(f"{share(outlook.goodput_share)} of requests within targets")
    if outlook.e2e_s_p99 is not None:
        parts.append(f"E2E p99 {words.seconds(outlook.e2e_s_p99)} s")
    parts.append(f"tails at {100 * outlook.lateness:.0f} % of their targets")
    if outlook.price_per_hour is not None:
        parts.append(f"{outlook.price_per_hour:,.2f} per hour")
    return ", ".join(parts)


def proof(decision: Decision, took_s: float) -> str:
    """How far from the best the plan may be, and what finding it took."""
    time = f"solved in {decision.solve_s or took_s:.2f} s"
    if decision.objective is None or decision.gap is None:
        return f"no bound was worked out; {time}"
    objective = _OBJECTIVES.get(decision.goal, "{:.4g}").format(decision.objective)
    how = "proven best" if decision.optimal else "the best found in time"
    bound = "" if decision.bound is None else f"bound {decision.bound:.4g}, "
    return f"{objective}, {how} ({bound}gap {100 * decision.gap:.2g} %); {time}"


def _switch(decision: Decision) -> str:
    switch = decision.switch
    assert switch is not None
    verdict = "pays" if switch.moves else "does not pay"
    served = share(switch.served_share)
    moved = f"{switch.bytes_moved / 1e9:,.0f} GB"
    parts = [
        f"{verdict}: takes {switch.seconds:.0f} s, {served} of the demand is served meanwhile",
        f"{moved} are moved, {switch.busiest_link_s:.0f} s of it over the busiest link",
        f"{switch.requests_paused:,.0f} requests are paused",
        f"gain {switch.gain:.3g} s of lateness, cost {switch.cost:.3g} s",
    ]
    if switch.horizon_s:
        parts.append(f"the forecast is trusted for {switch.horizon_s:,.0f} s")
    if switch.payback_s is not None:
        parts.append(f"paid back after {switch.payback_s:,.0f} s")
    parts += [text for text in (switch.step, switch.why) if text]
    return "; ".join(parts)


def _replicas(answer: Answer) -> Table:
    decision = answer.decision
    table = Table(title="Replicas (times in ms, p50 / p99)", title_justify="left")
    table.add_column("replica", overflow="fold", ratio=3)
    table.add_column("shape", no_wrap=True)
    table.add_column("GPUs", overflow="fold", ratio=3)
    table.add_column("sent, requests/s", overflow="fold", ratio=3)
    for name in ("busy", "TTFT", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in _alike(answer, decision.replicas):
        first = group[0]
        name, gpus = first.replica_id, words.gpus(first.gpus)
        if len(group) > 1:
            name = f"{len(group)} x {first.model_id}"
            gpus = f"{sum(len(one.gpus) for one in group)}: {gpus} ..."
        table.add_row(
            Text(name),
            Text(words.shape(first.parallelism)),
            Text(gpus),
            Text(_sent(answer, first)),
            _busy(first.utilisation),
            words.pair(first.ttft_s_p50, first.ttft_s_p99),
            words.pair(first.tpot_s_p50, first.tpot_s_p99),
        )
    told, there = len(decision.replicas), len(answer.plan.replicas) if answer.plan else 0
    if told < there:
        table.caption = f"{told} of {there} replicas; the plan file has all"
    return table


def _alike(answer: Answer, replicas: Sequence[ReplicaOutlook]) -> list[list[ReplicaOutlook]]:
    """Each alone while there are few; else those that differ in id and GPUs only, together."""
    groups: dict[object, list[ReplicaOutlook]] = {}
    for one in replicas:
        key: object = one.replica_id
        if len(replicas) > REPLICAS_SHOWN:
            key = (
                one.model_id,
                one.parallelism,
                _sent(answer, one),
                _busy(one.utilisation).plain,
                words.pair(one.ttft_s_p50, one.ttft_s_p99),
                words.pair(one.tpot_s_p50, one.tpot_s_p99),
            )
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _sent(answer: Answer, one: ReplicaOutlook) -> str:
    return words.counted(
        (answer.type_name(one.model_id, number), value)
        for number, value in sorted(one.arrivals_rps.items())
        if value > 0.0
    )


def _busy(utilisation: float) -> Text:
    return Text(f"{100 * utilisation:.0f} %", style="red" if utilisation > 1.0 else "")


def _types(answer: Answer) -> Table:
    models = {kind.model_id for kind in answer.decision.types}
    table = Table(title="Types (times in ms, p50 / p99)", title_justify="left")
    table.add_column("type", overflow="fold")
    table.add_column("arrivals, requests/s", justify="right")
    table.add_column("tokens in / out", justify="right", no_wrap=True)
    for name in ("TTFT", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("E2E p99, s", justify="right")
    table.add_column("within targets", justify="right")
    for kind in answer.decision.types:
        name = answer.type_name(kind.model_id, kind.request_type)
        table.add_row(
            Text(f"{kind.model_id} {name}" if len(models) > 1 else name),
            _arrivals(kind),
            f"{kind.input_tokens:,.0f} / {kind.output_tokens:,.0f}",
            words.pair(kind.ttft_s_p50, kind.ttft_s_p99),
            words.pair(kind.tpot_s_p50, kind.tpot_s_p99),
            words.seconds(kind.e2e_s_p99),
            share(kind.goodput_share),
        )
    return table


def _arrivals(kind: TypeOutlook) -> str:
    low, high = kind.arrivals_rps_p10, kind.arrivals_rps_p90
    if low == high:
        return words.rate(kind.arrivals_rps)
    return f"{words.rate(kind.arrivals_rps)} ({words.rate(low)} to {words.rate(high)})"


def _lines(title: str, texts: Sequence[str], *, style: str = "") -> list[RenderableType]:
    return [Text(f"{title}: {text}", style=style) for text in texts]
