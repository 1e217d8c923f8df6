"""Numbers and findings in words: what a comparison comes to, above all where ours loses."""

from collections.abc import Iterator, Sequence

from loadgen.compare.outcome import BY_NAME, DECISIVE, OURS, Cell, Metric, Versus, versus
from loadgen.compare.statistics import Estimate

NOTHING = "-"
_HEADLINES = ("goodput_rps", "e2e_ms_p99")
_STANDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("worse than", ("worse",)),
    ("better than", ("better",)),
    ("not to be told apart from", ("even", "unknown")),
)
LOSES = "LOSES"


def is_ours(policy: str) -> bool:
    """Whether a policy's name is this project's own, whatever forecast it was given."""
    return policy.partition("@")[0] == OURS


def number(value: float, unit: str) -> str:
    """Three digits that mean something; a share as a percentage, a count (no unit) as one."""
    if not unit:
        return f"{value:,.1f}".removesuffix(".0")
    if unit == "share":
        text = f"{100 * value:.1f} %"
        return "99.9+ %" if text == "100.0 %" and value < 1 else text
    magnitude = abs(value)
    if magnitude >= 100:  # noqa: PLR2004  # three digits
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"  # noqa: PLR2004  # same


def with_interval(value: Estimate | None, unit: str) -> str:
    """``12.3 [11.9, 12.7]``; without brackets for one run, ``-`` where there is no number."""
    if value is None:
        return NOTHING
    middle = number(value.mean, unit)
    if value.low is None or value.high is None:
        return middle
    low, high = (number(edge, unit).removesuffix(" %") for edge in (value.low, value.high))
    return f"{middle} [{low}, {high}]"


def ratio_words(ratio: Estimate | None) -> str:
    """``x1.25 [1.10, 1.40]``."""
    if ratio is None:
        return NOTHING
    if ratio.low is None or ratio.high is None:
        return f"x{ratio.mean:.3f}"
    return f"x{ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def findings(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Plain sentences: first where ours is worse than another policy (or that it is so nowhere),
    then where it is better, or neither. Each pair is compared run by run on DECISIVE metrics."""
    if not any(is_ours(cell.policy) for cell in cells):
        return ("This project's own policy was not among those compared.",)
    sentences: list[str] = []
    for cell in cells:
        if not is_ours(cell.policy):
            continue
        for other in cells:
            if other.load == cell.load and not is_ours(other.policy):
                pairs = [versus(BY_NAME[name], cell.runs, other.runs) for name in DECISIVE]
                sentences += _sentences(cell, other, pairs)
    losses = [sentence for sentence in sentences if LOSES in sentence]
    others = [sentence for sentence in sentences if LOSES not in sentence]
    return (*(losses or [_no_loss(cells)]), *others)


def summary(cells: Sequence[Cell]) -> tuple[str, ...]:
    """One sentence for each load, policy of ours and headline metric: better than whom, worse."""
    sentences: list[str] = []
    for cell in cells:
        others = [o for o in cells if o.load == cell.load and not is_ours(o.policy)]
        if not is_ours(cell.policy) or not others:
            continue
        for name in _HEADLINES:
            pairs = [(o.policy, versus(BY_NAME[name], cell.runs, o.runs)) for o in others]
            parts = [
                f"{words} {', '.join(_named(policy, pair) for policy, pair in found)}"
                for words, verdicts in _STANDINGS
                if (found := [entry for entry in pairs if entry[1].verdict in verdicts])
            ]
            title = BY_NAME[name].title
            sentences.append(
                f"At load {cell.load:g}, {cell.policy} on {title}: {'; '.join(parts)}."
            )
    return tuple(sentences)


def _named(policy: str, pair: Versus) -> str:
    return policy if pair.ratio is None else f"{policy} (x{pair.ratio.mean:.3f})"


def _no_loss(cells: Sequence[Cell]) -> str:
    if all(len(cell.seeds) == 1 for cell in cells):
        return "With one seed nothing can be told apart from chance: no policy is called better."
    return (
        "Ours loses nowhere beyond chance: in no pair is it significantly worse on "
        f"{', '.join(BY_NAME[name].title for name in DECISIVE)}."
    )


def _sentences(cell: Cell, other: Cell, pairs: Sequence[Versus]) -> Iterator[str]:
    at = f"At load {cell.load:g}"
    worse = [_amount(pair, cell, other) for pair in pairs if pair.verdict == "worse"]
    better = [_amount(pair, cell, other) for pair in pairs if pair.verdict == "better"]
    rest = [BY_NAME[pair.metric].title for pair in pairs if pair.verdict in ("even", "unknown")]
    if worse:
        yield f"{at}, {cell.policy} {LOSES} to {other.policy}: {'; '.join(worse)}."
    if better:
        yield f"{at}, {cell.policy} beats {other.policy}: {'; '.join(better)}."
    if rest and len(cell.seeds) > 1:
        yield f"{at}, {cell.policy} and {other.policy} cannot be told apart on {', '.join(rest)}."


def _amount(pair: Versus, cell: Cell, other: Cell) -> str:
    metric = BY_NAME[pair.metric]
    ours, theirs = _plain(cell, metric), _plain(other, metric)
    words = f"{metric.title} {ours} against {theirs}"
    if pair.ratio is not None:
        return f"{words} ({ratio_words(pair.ratio)})"
    if pair.difference is not None:
        return f"{words} (difference {with_interval(pair.difference, metric.unit)})"
    return words


def _plain(cell: Cell, metric: Metric) -> str:
    value = cell.values[metric.name]
    if value is None:
        return "never ended" if metric.unit == "ms" else NOTHING
    unit = "" if metric.unit == "share" else f" {metric.unit}"
    return number(value.mean, metric.unit) + unit
