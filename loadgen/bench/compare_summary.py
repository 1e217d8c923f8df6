"""What the cells of the study come to: each policy against others, and the whole as Markdown.

Ratios are of one cell each, above 1 where the policy is better, and means of ratios are geometric.
A percentile that never ended has no ratio: such cells are counted beside the mean, never dropped in
silence. GPU-hours are compared where the policy's SLO attainment is at most one point below the
other's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from loadgen.bench.compare_cells import Row

AGAINST = ("static-best", "static-default", "uniform-reload", "oserve-paper@oracle")
TOLERANCE = 0.97  # a ratio below it is a loss: more than 3 % worse
ATTAINMENT_POINT = 0.01
OVERALL = "all"
_P99, _GOODPUT, _HOURS, _ATTAINED = "e2e_ms_p99", "goodput_rps", "gpu_hours", "slo_attainment"


class Mean(msgspec.Struct, frozen=True, kw_only=True):
    """Ratios over cells. ``mean`` and ``worst`` are None where no cell has a ratio. ``never``:
    cells in which only the policy has no value (its percentile never ended, its goodput is 0),
    which are losses; ``others_never``: only the other has none."""

    cells: int
    mean: float | None
    worst: float | None
    lost: int
    never: int
    others_never: int


class Versus(msgspec.Struct, frozen=True, kw_only=True):
    """``gpu_hours``: other's over the policy's, in ``equal`` cells of about the same attainment or
    better."""

    workload: str
    policy: str
    against: str
    p99: Mean
    goodput: Mean
    gpu_hours: float | None
    equal: int


def summary(rows: Sequence[Row]) -> list[Versus]:
    """Every policy against each of AGAINST, for each workload and over all."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    found: list[Versus] = []
    for workload in (*workloads, OVERALL):
        own = [row for row in rows if workload in (OVERALL, row.workload)]
        for other in AGAINST:
            for policy in policies:
                pairs = pairs_of(own, policy, other)
                if policy != other and pairs:
                    found.append(_versus(workload, policy, other, pairs))
    return found


def pairs_of(rows: Iterable[Row], policy: str, other: str) -> list[tuple[Row, Row]]:
    """The rows of two policies in the same cells."""
    known = list(rows)
    others = {row.cell: row for row in known if row.policy == other}
    return [(row, others[row.cell]) for row in known if row.policy == policy and row.cell in others]


def p99_ratio(row: Row, other: Row) -> float:
    """Above 1: ``row`` is faster. Infinite or 0 where only one of them ended, 1 where none did."""
    return _ratio(other.values[_P99], row.values[_P99], never=math.inf)


def goodput_ratio(row: Row, other: Row) -> float:
    """Above 1: ``row`` served more in time. 1 where neither served any."""
    return _ratio(row.values[_GOODPUT], other.values[_GOODPUT], never=0.0)


def markdown(rows: Sequence[Row]) -> str:
    """Summary and every cell, losses in bold."""
    found = summary(rows)
    parts = [*_overall(found), *_by_workload(found)]
    for models, gpus in dict.fromkeys((row.models, row.gpus) for row in rows):
        own = [row for row in rows if (row.models, row.gpus) == (models, gpus)]
        parts += _cells(own, f"{models}, {gpus} H100", "P99 of E2E", p99_ratio)
        parts += _cells(own, f"{models}, {gpus} H100", "goodput", goodput_ratio)
    return "\n".join(parts) + "\n"


def _ratio(above: float | None, below: float | None, *, never: float) -> float:
    top = never if above is None else above
    bottom = never if below is None else below
    if top == bottom:
        return 1.0
    if math.isinf(bottom):
        return 0.0
    return math.inf if bottom == 0.0 else top / bottom


def _versus(workload: str, policy: str, other: str, pairs: Sequence[tuple[Row, Row]]) -> Versus:
    equal = [(a, b) for a, b in pairs if _attained(a) >= _attained(b) - ATTAINMENT_POINT]
    hours = [_ratio(b.values[_HOURS], a.values[_HOURS], never=0.0) for a, b in equal]
    return Versus(
        workload=workload,
        policy=policy,
        against=other,
        p99=_mean([p99_ratio(a, b) for a, b in pairs]),
        goodput=_mean([goodput_ratio(a, b) for a, b in pairs]),
        gpu_hours=_mean(hours).mean,
        equal=len(equal),
    )


def _attained(row: Row) -> float:
    return row.values[_ATTAINED] or 0.0


def _mean(ratios: Sequence[float]) -> Mean:
    usable = [ratio for ratio in ratios if 0.0 < ratio < math.inf]
    mean = math.exp(math.fsum(map(math.log, usable)) / len(usable)) if usable else None
    return Mean(
        cells=len(ratios),
        mean=mean,
        worst=min(usable, default=None),
        lost=sum(ratio < TOLERANCE for ratio in ratios),
        never=sum(ratio == 0.0 for ratio in ratios),
        others_never=sum(math.isinf(ratio) for ratio in ratios),
    )


def _overall(found: Sequence[Versus]) -> Iterator[str]:
    cells = max((one.p99.cells for one in found), default=0)
    yield (
        f"Over {cells} cells (workload, models, GPUs, load): mean ratio / worst ratio / cells more "
        "than 3 % worse. Above 1: the policy of the row is better.\n"
    )
    yield "| policy | against | P99 of E2E | goodput | GPU-hours at equal attainment |"
    yield "|---|---|---|---|---|"
    for one in found:
        if one.workload == OVERALL:
            hours = f"{_number(one.gpu_hours)} in {one.equal} of {one.p99.cells}"
            yield (
                f"| {one.policy} | {one.against} | {_words(one.p99)} | {_words(one.goodput)} | "
                f"{hours} |"
            )
    yield ""


def _by_workload(found: Sequence[Versus]) -> Iterator[str]:
    """Against static-best, workload by workload."""
    own = [one for one in found if one.workload != OVERALL and one.against == AGAINST[0]]
    policies = list(dict.fromkeys(one.policy for one in own))
    if not policies:
        return
    yield f"By workload, against {AGAINST[0]}: mean ratio of P99 of E2E; of goodput.\n"
    yield f"| workload | {' | '.join(policies)} |"
    yield f"|---|{'---|' * len(policies)}"
    for workload in dict.fromkeys(one.workload for one in own):
        here = {one.policy: one for one in own if one.workload == workload}
        cells = [_short(here.get(policy)) for policy in policies]
        yield f"| {workload} | {' | '.join(cells)} |"
    yield ""


def _cells(
    rows: Sequence[Row], where: str, what: str, ratio: Callable[[Row, Row], float]
) -> Iterator[str]:
    """One line for each workload and load: what the reference has, and the others' ratios."""
    reference = AGAINST[0]
    policies = [p for p in dict.fromkeys(row.policy for row in rows) if p != reference]
    yield f"{where}, {what}: ratio to {reference}, more than 3 % worse in bold.\n"
    yield f"| workload | load | {reference} | {' | '.join(policies)} |"
    yield f"|---|---|---|{'---|' * len(policies)}"
    by_cell: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_cell.setdefault((row.workload, row.load), {})[row.policy] = row
    for (workload, load), here in by_cell.items():
        if reference in here:
            best = here[reference]
            cells = [
                _cell(ratio(here[policy], best)) if policy in here else "" for policy in policies
            ]
            yield f"| {workload} | {load:g} | {_plain(best, what)} | {' | '.join(cells)} |"
    yield ""


def _plain(row: Row, what: str) -> str:
    if what == "goodput":
        return f"{row.values[_GOODPUT] or 0.0:.2f}/s"
    p99_ms = row.values[_P99]
    return "never" if p99_ms is None else f"{p99_ms / 1000.0:.1f} s"


def _cell(ratio: float) -> str:
    text = "none" if ratio == 0.0 else "only" if math.isinf(ratio) else f"{ratio:.2f}"
    return f"**{text}**" if ratio < TOLERANCE else text


def _words(mean: Mean) -> str:
    text = f"{_number(mean.mean)} / {_number(mean.worst)} / {mean.lost}"
    extra = [f"never in {mean.never}"] if mean.never else []
    extra += [f"the other never in {mean.others_never}"] if mean.others_never else []
    return f"{text} ({', '.join(extra)})" if extra else text


def _short(one: Versus | None) -> str:
    return "" if one is None else f"{_number(one.p99.mean)}; {_number(one.goodput.mean)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
