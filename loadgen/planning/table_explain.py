"""Why a plan is what it is, and what other hardware would bring, as tables of 100 columns."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from loadgen.planning import words
from loadgen.planning.advice import Brought
from loadgen.planning.answer import Answer, Rate
from loadgen.planning.grid import Row, left, right, section, wide
from loadgen.planning.report import Report
from loadgen.report_table import share
from shared.hardware import Parallelism
from shared.messages.decisions import PlanOutlook

ABREAST = 3
"""What-ifs side by side: more would not be readable."""

_WORTH = right("carries", "p99 / targets", "in time", "E2E p99, s")


def explained(report: Report) -> list[RenderableType]:
    """The other plans, the bottleneck, what more hardware brings, and what each shape serves."""
    answer, decision = report.answer, report.answer.decision
    parts: list[RenderableType] = []
    if decision.chosen is not None:
        parts += _alternatives(decision.chosen, decision.alternatives)
    said = [f"Bottleneck: {decision.bottleneck}"] if decision.bottleneck else []
    said += [f"Advice: {text}" for text in decision.advice]
    parts += ["", *(Text(text) for text in said)] if said else []
    if report.brought:
        parts += _brought(report.brought)
    parts += ["", *(Text(text) for text in report.starts)] if report.starts else []
    if report.rates:
        parts += _rates(answer, report.rates)
    return parts


def compared(report: Report) -> list[RenderableType]:
    """The plan beside those of each what-if, a few at a time; ratios are to the first column's."""
    title = "What if: ratios to what is"
    if report.fresh is not None:
        title += "; all as if nothing were in force"
    base = ("as it is", report.fresh or report.answer)
    others = [(changed.what_if, changed.answer) for changed in report.what_ifs]
    parts: list[RenderableType] = []
    for first in range(0, len(others), ABREAST):
        parts += _compared(title, [base, *others[first : first + ABREAST]])
    return parts


def _compared(title: str, named: Sequence[tuple[str, Answer]]) -> list[RenderableType]:
    answers = [answer for _, answer in named]
    prices = [one.price_per_hour for one in answers]
    used = [_gpus_used(one) for one in answers]
    rows = [
        _words("machines", [one.gpus for one in answers]),
        _words("plan", [one.brief for one in answers]),
        _ratios("GPUs used", used, [str(count) for count in used]),
        _ratios("their price per hour", prices, [f"{price:,.2f}" for price in prices]),
        *_figures(answers),
    ]
    rows = [row for row in rows if any(cell != words.NOTHING for cell in row.cells[1:])]
    return section(title, (*left(""), *wide(*(name for name, _ in named))), rows)


def _gpus_used(answer: Answer) -> int:
    return sum(len(spec.gpus) for spec in answer.plan.replicas) if answer.plan else 0


def _figures(answers: Sequence[Answer]) -> list[Row]:
    chosen = [one.decision.chosen for one in answers]
    demands = [one.arrivals_rps for one in answers]
    headrooms = [outlook.headroom if outlook else None for outlook in chosen]
    shares = [share(outlook.goodput_share if outlook else None) for outlook in chosen]
    late = [outlook.lateness if outlook else None for outlook in chosen]
    rows = [
        _ratios("demand, requests/s", demands, [words.rate(value) for value in demands]),
        _ratios("carries, times its p90", headrooms, [words.times(value) for value in headrooms]),
        _ratios("p99 / targets", late, [words.percent(value) for value in late]),
        _words("in time", shares),
    ]
    for name, field in (("TTFT p99, ms", "ttft_s_p99"), ("TPOT p99, ms", "tpot_s_p99")):
        values = [_worst(one, field) for one in answers]
        texts = [words.milliseconds(value) for value in values]
        rows.append(_ratios(f"{name}, slowest type", values, texts))
    e2es = [outlook.e2e_s_p99 if outlook else None for outlook in chosen]
    rows.append(_ratios("E2E p99, s", e2es, [words.seconds(value) for value in e2es]))
    busiest = [
        max((replica.utilisation for replica in one.decision.replicas), default=None)
        for one in answers
    ]
    texts = [words.percent(value) for value in busiest]
    rows.append(_ratios("busiest replica", busiest, texts))
    return rows


def _worst(answer: Answer, field: str) -> float | None:
    values: list[float] = [
        value for kind in answer.decision.types if (value := getattr(kind, field)) is not None
    ]
    return max(values, default=None)


def _words(name: str, texts: Sequence[str]) -> Row:
    return Row(cells=(name, *texts))


def _ratios(name: str, values: Sequence[float | None], texts: Sequence[str]) -> Row:
    first = values[0]
    cells = [
        f"{text} ({value / first:.2f} x)"
        if value != first and value is not None and first
        else text
        for value, text in zip(values, texts, strict=True)
    ]
    return Row(cells=(name, *cells))


def _alternatives(chosen: PlanOutlook, others: Sequence[PlanOutlook]) -> list[RenderableType]:
    columns = (*wide("plan"), *right("GPUs"), *_WORTH, *wide("why"))
    why = f"chosen: {chosen.why}" if chosen.why else "chosen"
    rows = [Row(cells=(*_line(chosen), why), style="bold")]
    rows += [Row(cells=(*_line(other), other.why or words.NOTHING)) for other in others]
    return section("The plan, and those that lost", columns, rows)


def _line(outlook: PlanOutlook) -> tuple[str, ...]:
    return (
        outlook.plan,
        str(outlook.gpus),
        words.times(outlook.headroom),
        words.percent(outlook.lateness),
        share(outlook.goodput_share),
        words.seconds(outlook.e2e_s_p99),
    )


def _brought(brought: Sequence[Brought]) -> list[RenderableType]:
    columns = (*wide("added", "best plan then"), *_WORTH, *left(""))
    rows = [
        Row(
            cells=(
                one.what,
                one.plan,
                words.times(one.headroom) + _gain(one.gain),
                words.percent(one.lateness),
                share(one.goodput_share),
                words.seconds(one.e2e_s_p99),
                "helps" if one.worth_it else "no gain",
            )
        )
        for one in brought
    ]
    return section("What more hardware would bring", columns, rows)


def _gain(gain: float | None) -> str:
    return "" if gain is None else f" ({100 * gain:+.0f} %)"


def _rates(answer: Answer, rates: Sequence[Rate]) -> list[RenderableType]:
    """A table for each model: one row for each shape, one column for each type; bold is what the
    plan uses."""
    models = list(dict.fromkeys(one.model_id for one in rates))
    parts: list[RenderableType] = []
    for model_id in models:
        of = f" of {model_id}" if len(models) > 1 else ""
        title = f"What one replica{of} serves of one type alone within its targets, requests/s"
        own = [one for one in rates if one.model_id == model_id]
        parts += _rates_of(title, answer, own)
    return parts


def _rates_of(title: str, answer: Answer, rates: Sequence[Rate]) -> list[RenderableType]:
    types = list(dict.fromkeys(one.request_type for one in rates))
    names = [answer.type_name(rates[0].model_id, number) for number in types]
    found = {(one.gpu_kind, one.parallelism, one.request_type): one for one in rates}
    shapes = sorted(
        {(one.gpu_kind, Parallelism.parse(one.parallelism)) for one in rates},
        key=lambda key: (key[0], key[1].gpus, key[1]),
    )
    several = len({kind for kind, _ in shapes}) > 1
    rows: list[Row] = []
    for kind, parallelism in shapes:
        cells = [
            words.rate(found[kind, str(parallelism), number].requests_per_s) for number in types
        ]
        name = words.shape(str(parallelism))
        used = (kind, str(parallelism)) in answer.shapes
        name = f"{name} on {kind}" if several else name
        rows.append(Row(cells=(name, *cells), style="bold" if used else ""))
    return section(title, (*left("shape"), *right(*names)), rows)
