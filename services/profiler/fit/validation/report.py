"""All comparisons, and their table."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from services.profiler.fit.build import Fitted, Tables
from services.profiler.fit.gpus import KINDS
from services.profiler.fit.installed_source import package_folder
from services.profiler.fit.validation import (
    distserve,
    engines,
    held_out,
    layers,
    older_engines,
    splitwise,
)
from services.profiler.fit.validation.compared import Accuracy, Comparison, accuracy
from shared.errors import ConfigInvalid


def operator_accuracy(tables: Tables, fitted: Fitted) -> Iterator[Accuracy]:
    """On rows of the operator tables that were held out."""
    for name in sorted(fitted.gpus):
        kind = KINDS[name]
        yield accuracy(held_out.gemms(tables, kind))
        yield accuracy(held_out.gemms_between(tables, kind))
        for one in held_out.steps(tables, fitted, kind):
            yield accuracy(one)


def engine_accuracy(tables: Tables, fitted: Fitted) -> Iterator[Accuracy]:
    """On whole engines and layers measured by others; what is not at hand is left out, and
    ``missing`` says so."""
    found: list[Iterable[Comparison]] = [engines.published(tables, fitted)]
    if (package := _package()) is not None:
        found.append(engines.runs(fitted, package))
    if tables.folder is not None:
        folder = tables.folder
        found += [
            splitwise.compare(fitted, folder),
            distserve.compare_times(fitted, folder),
            distserve.compare_capacities(fitted, folder),
            layers.vidur_layers(fitted, folder),
            layers.vidur_collectives(fitted, folder),
            layers.simulated_layers(fitted, folder),
            [older_engines.sageserve(fitted, folder)],
            older_engines.ibm(tables, fitted, folder),
        ]
    for group in found:
        yield from map(accuracy, group)


def missing(tables: Tables) -> Sequence[str]:
    """Sources that could not be compared, each with its remedy."""
    words: list[str] = []
    if _package() is None:
        words.append(f'{engines.RUNS}: pip install "oserve[profile]"')
    if tables.folder is None:
        words.append("Splitwise, DistServe, Vidur, IBM and others: --tables FOLDER")
    return words


def _package() -> Path | None:
    try:
        folder = package_folder()
    except ConfigInvalid:
        return None
    return folder if (folder / "systems" / engines.RUNS_FILE).is_file() else None


def table(rows: Sequence[Accuracy]) -> str:
    """For a terminal; sources as headings."""
    head = f"{'what':34}{'GPU':9}{'model':20}{'rows':>6}{'median':>8}{'p90':>7}{'bias':>8}"
    lines = [
        head + f"{'level':>7}{'median*':>8}{'p90*':>7}{'median+':>8}{'p90+':>7}  calibrated on"
    ]
    source = ""
    for row in rows:
        if row.source != source:
            source = row.source
            lines += ["", source]
        levels = f"{_share(row.level_median):>8}{_share(row.level_p90):>7}"
        levels += f"{_share(row.offset_median):>8}{_share(row.offset_p90):>7}"
        lines.append(
            f"{row.what:34}{row.gpu:9}{row.model:20}{row.rows:6}{row.median:8.1%}{row.p90:7.1%}"
            f"{row.bias:+8.1%}{row.level:7.2f}{levels}  {row.calibrated}"
        )
    lines += [
        "",
        "median, p90: of |predicted / measured - 1|; bias: median of predicted / measured - 1;",
        "level: median of measured / predicted; *: once predictions are multiplied by it;",
        "+: once the median of measured - predicted is added to them instead",
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
