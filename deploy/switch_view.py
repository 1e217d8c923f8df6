"""What a person sees of a switch: a bar while it goes, a report when it has ended."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.switch_watch import SwitchOutcome
from shared.messages.plans import SwitchProgress, SwitchReport

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024.0
_LINKS_SHOWN = 32


class Bar:
    """A progress bar on a terminal; elsewhere a line for each phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task("asked for", total=None)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, said: SwitchProgress) -> None:
        if self._progress is not None:
            total = said.bytes_total or None
            self._progress.update(
                self._task, description=said.phase, completed=said.bytes_done, total=total
            )
        elif said.phase != self._phase:
            done = f", {amount(said.bytes_done)} of {amount(said.bytes_total)}"
            moved = done if said.bytes_total else ""
            self._console.print(f"{said.elapsed_s:7.2f} s  {said.phase}{moved}")
        self._phase = said.phase


def report_lines(outcome: SwitchOutcome) -> Iterator[str]:
    """The whole report of a switch that succeeded."""
    way = f"{outcome.way} switch" if outcome.way else "no switch was needed"
    took = f" in {outcome.took_s:.2f} s" if outcome.way else ""
    yield f"{outcome.plan or outcome.plan_id} is in force as epoch {outcome.epoch}: {way}{took}"
    if outcome.why:
        yield f"  why: {outcome.why}"
    report = outcome.report
    if report is None:
        if outcome.way:
            yield "  nobody told the details"
        return
    yield f"  requests   {_requests(report)}"
    yield f"  bytes      {_bytes(report)}"
    links = sorted(report.bytes_by_link.items(), key=lambda link: (-link[1], link[0]))
    for link, count in links[:_LINKS_SHOWN]:
        source, _, target = link.partition(">")
        yield f"             {amount(count):>10}  {source} -> {target}"
    if len(links) > _LINKS_SHOWN:
        yield f"             and {len(links) - _LINKS_SHOWN} links more"
    phases = ", ".join(f"{name} {_time(took_s)}" for name, took_s in report.phase_s.items())
    yield f"  phases     {phases or 'none told'}"
    if report.stages > 1:
        yield f"  stages     {report.stages}: old and new did not fit side by side"
    for note in report.notes:
        yield f"  note       {note}"


def in_short(outcome: SwitchOutcome) -> str:
    """One line of it."""
    if not outcome.succeeded:
        return outcome.failure
    report = outcome.report
    head = f"{outcome.way or 'no'} switch to {outcome.plan or outcome.plan_id}"
    if report is None:
        return f"{head} in {outcome.took_s:.2f} s"
    return f"{head} in {outcome.took_s:.2f} s: {_requests(report)}; {_bytes(report)}"


def amount(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in _UNITS[:-1]:
        if count < _STEP:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} {_UNITS[-1]}"


def _requests(report: SwitchReport) -> str:
    if not report.moved + report.replayed:
        return "none in flight"
    pause = f"paused {_time(report.pause_p50_s)} p50, {_time(report.pause_p99_s)} p99"
    return f"{report.moved} moved, {report.replayed} replayed, {pause}"


def _bytes(report: SwitchReport) -> str:
    """All that was not in place, against the bound of that."""
    disk = sum(count for link, count in report.bytes_by_link.items() if link.startswith("disk>"))
    moved = sum(report.bytes_by_link.values())
    ratio = f", {moved / report.bytes_bound:.2f} x" if report.bytes_bound else ""
    parts = [f"{amount(moved)} moved (bound {amount(report.bytes_bound)}{ratio})"]
    if disk:
        parts.append(f"{amount(disk)} of it from disk")
    if report.bytes_in_place:
        parts.append(f"{amount(report.bytes_in_place)} in place")
    if report.cache_bytes:
        ahead = f"{amount(report.cache_ahead_bytes)} ahead of the pause"
        parts.append(f"KV cache {amount(report.cache_bytes)}, {ahead}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{1000.0 * seconds:.0f} ms"
