"""Why a plan is what it is, and what other hardware would bring, as tables of 100 columns."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.planning import words
from loadgen.planning.advice import Brought
from loadgen.planning.planner import Answer, Rate
from loadgen.planning.report import Report
from loadgen.report_table import share
from shared.hardware import Parallelism
from shared.messages.decisions import PlanOutlook


def explained(report: Report) -> list[RenderableType]:
    """The other plans, the bottleneck, what more hardware brings, and what each shape serves."""
    answer, decision = report.answer, report.answer.decision
    parts: list[RenderableType] = []
    outlooks = [o for o in (decision.chosen, *decision.alternatives) if o is not None]
    if outlooks:
        parts += ["", _alternatives(outlooks)]
    if decision.bottleneck:
        parts.append(Text(f"Bottleneck: {decision.bottleneck}"))
    parts += [Text(f"Advice: {text}") for text in decision.advice]
    if report.brought:
        parts += ["", _brought(report.brought)]
    parts += [Text(text) for text in report.starts]
    if report.rates:
        parts += ["", _rates(answer, report.rates)]
    return parts


def compared(report: Report) -> RenderableType:
    """The plan beside those of each what-if; ratios are to the first column's."""
    answers = [report.fresh or report.answer, *(changed.answer for changed in report.what_ifs)]
    names = ["now", *(changed.what_if for changed in report.what_ifs)]
    title = "What if (ratios to the first)"
    if report.fresh is not None:
        title = "What if (ratios to the first; all as if nothing were in force)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(Text(name, overflow="fold"), overflow="fold")
    first = answers[0]
    table.add_row("machines", *(Text(one.gpus) for one in answers))
    table.add_row(
        "list price, US$/h",
        *(_ratio(one.price_per_hour, first.price_per_hour, f"{one.price_per_hour:,.2f}")
          for one in answers),
    )  # fmt: skip
    table.add_row("plan", *(Text(one.decision.chosen.plan if one.decision.chosen else "none")
                            for one in answers))  # fmt: skip
    for name, cells in _figures(answers):
        table.add_row(name, *cells)
    return table


def _figures(answers: Sequence[Answer]) -> list[tuple[str, list[str]]]:
    def row(name: str, values: Sequence[float | None], texts: Sequence[str]) -> None:
        cells = [_ratio(value, values[0], text) for value, text in zip(values, texts, strict=True)]
        rows.append((name, cells))

    rows: list[tuple[str, list[str]]] = []
    demands = [_offered(one) for one in answers]
    chosen = [one.decision.chosen for one in answers]
    row("demand, requests/s", demands, [words.rate(value) for value in demands])
    headrooms = [outlook.headroom if outlook else None for outlook in chosen]
    row("carries, times its demand", headrooms, [words.times(value) for value in headrooms])
    rows.append(
        (
            "within targets",
            [share(outlook.goodput_share if outlook else None) for outlook in chosen],
        )
    )
    for name, of in (("TTFT p99, ms", "ttft_s_p99"), ("TPOT p99, ms", "tpot_s_p99")):
        values = [_worst(one, of) for one in answers]
        row(f"{name}, worst type", values, [words.milliseconds(value) for value in values])
    e2es = [outlook.e2e_s_p99 if outlook else None for outlook in chosen]
    row("E2E p99, s", e2es, [words.seconds(value) for value in e2es])
    busiest = [_busiest(one) for one in answers]
    row("busiest replica, %", busiest, [_percent(value) for value in busiest])
    return rows


def _offered(answer: Answer) -> float:
    return sum(kind.arrivals_rps for kind in answer.decision.types)


def _worst(answer: Answer, field: str) -> float | None:
    values: list[float] = [
        value for kind in answer.decision.types if (value := getattr(kind, field)) is not None
    ]
    return max(values, default=None)


def _busiest(answer: Answer) -> float | None:
    return max((one.utilisation for one in answer.decision.replicas), default=None)


def _percent(value: float | None) -> str:
    return words.NOTHING if value is None else f"{100 * value:.0f} %"


def _ratio(value: float | None, first: float | None, text: str) -> str:
    if value is None or not first or value == first:
        return text
    return f"{text}  ({value / first:.2f} x)"


def _alternatives(outlooks: Sequence[PlanOutlook]) -> Table:
    table = Table(title="The plan and those that lost", title_justify="left")
    table.add_column("plan", overflow="fold", ratio=3)
    table.add_column("GPUs", justify="right")
    table.add_column("carries", justify="right", no_wrap=True)
    table.add_column("tails / targets", justify="right")
    table.add_column("within targets", justify="right")
    table.add_column("E2E p99, s", justify="right")
    table.add_column("why", overflow="fold", ratio=3)
    for number, outlook in enumerate(outlooks):
        table.add_row(
            Text(outlook.plan),
            str(outlook.gpus),
            words.times(outlook.headroom),
            f"{100 * outlook.lateness:.0f} %",
            share(outlook.goodput_share),
            words.seconds(outlook.e2e_s_p99),
            Text(outlook.why or ("chosen" if number == 0 else words.NOTHING)),
            style="bold" if number == 0 else "",
        )
    return table


def _brought(brought: Sequence[Brought]) -> Table:
    table = Table(title="What more hardware would bring", title_justify="left")
    table.add_column("added", overflow="fold", ratio=2)
    table.add_column("plan", overflow="fold", ratio=3)
    table.add_column("carries", justify="right")
    table.add_column("tails / targets", justify="right")
    table.add_column("within targets", justify="right")
    table.add_column("E2E p99, s", justify="right")
    table.add_column("", no_wrap=True)
    for one in brought:
        table.add_row(
            Text(one.what),
            Text(one.plan),
            f"{words.times(one.headroom)} ({100 * one.gain:+.0f} %)",
            f"{100 * one.lateness:.0f} %",
            share(one.goodput_share),
            words.seconds(one.e2e_s_p99),
            "helps" if one.worth_it else "no gain",
        )
    return table


def _rates(answer: Answer, rates: Sequence[Rate]) -> Table:
    """One row for each shape, one column for each type."""
    types = list(dict.fromkeys((one.model_id, one.request_type) for one in rates))
    models = {model_id for model_id, _ in types}
    found = {(r.model_id, r.gpu_kind, r.parallelism, r.request_type): r for r in rates}
    table = Table(
        title="What one replica serves of one type alone, within its targets, requests/s",
        title_justify="left",
    )
    table.add_column("shape", no_wrap=True)
    for model_id, number in types:
        name = answer.type_name(model_id, number)
        heading = f"{model_id} {name}" if len(models) > 1 else name
        table.add_column(Text(heading), justify="right", overflow="fold")
    shapes = sorted(
        {(r.gpu_kind, Parallelism.parse(r.parallelism)) for r in rates},
        key=lambda key: (key[0], key[1].gpus, key[1]),
    )
    several = len({kind for kind, _ in shapes}) > 1
    for kind, parallelism in shapes:
        cells = [
            words.rate(one.requests_per_s)
            if (one := found.get((model_id, kind, str(parallelism), number))) is not None
            else words.NOTHING
            for model_id, number in types
        ]
        shape = words.shape(str(parallelism))
        used = any(one.parallelism == str(parallelism) for one in answer.decision.replicas)
        name = f"{shape} on {kind}" if several else shape
        table.add_row(Text(name), *cells, style="bold" if used else "")
    return table
