"""``oserve replay``: a trace against a server, and the report of what came of it."""

import asyncio
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loadgen import client
from loadgen.picture import check_picture, draw
from loadgen.report import Report
from loadgen.report_table import report_tables
from loadgen.run import ReplayOptions, load_arrivals, replay_arrivals, run_replay
from loadgen.workload.arrivals import Selection
from shared.errors import ConfigInvalid, OServeError
from shared.slo import SLO_CLASSES, SloClass, SloTarget

__all__ = ["ReplayOptions", "replay", "run_replay", "write_outputs"]

_EXIT_FAILED, _EXIT_USAGE = 1, 2
_PROGRESS_PERIOD_S = 0.2


Trace = Annotated[
    str,
    typer.Argument(
        help="Azure or BurstGPT CSV, Mooncake JSON lines or our CSV, plain or .gz; "
        "or `generator` for the built-in workload."
    ),
]
Duration = Annotated[
    float | None, typer.Option(help="Seconds of the trace to replay; default all.")
]
TimeScale = Annotated[float, typer.Option(help="Stretch the clock: 2 replays at half speed.")]
RateScale = Annotated[
    float, typer.Option(help="Below 1 drop requests at random, above 1 add copies.")
]
ClassName = Annotated[
    str | None,
    typer.Option("--class", help="SLO class of requests that name none in the trace."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="SLO target for the report: CLASS=TTFT_MS,TPOT_MS. Repeatable."),
]
ApiKey = Annotated[str, typer.Option(envvar="OSERVE_API_KEY", help="Sent as a bearer token.")]
ConcurrencyMax = Annotated[
    int, typer.Option(help="Connections; a request beyond is refused here and counted.")
]
Vocabulary = Annotated[str, typer.Option(help="Token ids that prompts are made of, MIN:MAX.")]
PicturePath = Annotated[
    Path | None, typer.Option(help="Draw load and latency over time; .png or .svg.")
]


def replay(  # noqa: PLR0913, PLR0917  # one parameter per option of the command line
    trace: Trace,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    start: Annotated[float, typer.Option(help="Begin at this second of the trace.")] = 0.0,
    duration: Duration = None,
    time_scale: TimeScale = 1.0,
    rate_scale: RateScale = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiply prompt and output lengths.")] = 1.0,
    input_max: Annotated[int | None, typer.Option(help="Cut prompts at this many tokens.")] = None,
    output_max: Annotated[int | None, typer.Option(help="Cut outputs at this many.")] = None,
    limit: Annotated[int | None, typer.Option(help="Send only the first so many.")] = None,
    slo_class: ClassName = None,
    target: Targets = None,
    model: Annotated[str, typer.Option(help="Default: the first that the server lists.")] = "",
    api_key: ApiKey = "",
    concurrency_max: ConcurrencyMax = 8192,
    seed: Annotated[int, typer.Option(help="Of thinning, prompts and sampling.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds allowed to one request.")] = 600.0,
    vocabulary: Vocabulary = "32:255",
    report: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    picture: PicturePath = None,
) -> None:
    """Replay a trace in open loop: arrivals never wait for answers. Ends with 0 only if every
    request completed."""
    try:
        first, last = _vocabulary(vocabulary)
        options = ReplayOptions(
            trace=trace,
            url=url,
            selection=Selection(
                start_s=start,
                duration_s=duration,
                rate_scale=rate_scale,
                time_scale=time_scale,
                length_scale=length_scale,
                limit=limit,
                input_tokens_max=input_max,
                output_tokens_max=output_max,
                seed=seed,
            ),
            model=model,
            api_key=api_key,
            slo_class=_slo_class(slo_class),
            seed=seed,
            timeout_s=timeout,
            connections_max=concurrency_max,
            vocabulary_min=first,
            vocabulary_max=last,
            targets=_targets(target or []),
            command=_command(),
        )
        _check_outputs(report, picture)
        outcome = uvloop.run(_replay_shown(options, Console()))
    except OServeError as error:
        Console(stderr=True).print(f"oserve replay: {error}", style="red", markup=False)
        code = _EXIT_USAGE if isinstance(error, ConfigInvalid) else _EXIT_FAILED
        raise typer.Exit(code) from None
    Console().print(report_tables(outcome))
    for written in write_outputs(outcome, report=report, picture=picture):
        Console().print(f"written: {written}", markup=False)
    raise typer.Exit(0 if outcome.all_completed else _EXIT_FAILED)


def write_outputs(
    outcome: Report, *, report: Path | None = None, picture: Path | None = None
) -> list[Path]:
    """The report as JSON and as a picture, where asked for; returns what was written."""
    if report is not None:
        report.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")
    if picture is not None:
        draw(outcome, picture)
    return [path for path in (report, picture) if path is not None]


def _check_outputs(report: Path | None, picture: Path | None) -> None:
    """What cannot be written is said before the replay, not after an hour of it."""
    for field, path in (("report", report), ("picture", picture)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigInvalid(field=field, value=str(path), remedy="make its folder first")
    if picture is not None:
        check_picture(picture)


async def _replay_shown(options: ReplayOptions, console: Console) -> Report:
    """Replay under a progress bar. The first Ctrl-C ends the replay and reports what there is."""
    arrivals = await asyncio.to_thread(load_arrivals, options)
    progress = client.Progress()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, _interrupted, progress)
    bar = Progress(
        TextColumn("replaying"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} ended  {task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
    )
    task = bar.add_task("", total=len(arrivals), state="")
    shown = _Shown(bar, task, progress)
    try:
        with bar:
            shown.refresh()
            return await replay_arrivals(arrivals, options, progress=progress)
    finally:
        shown.end()
        loop.remove_signal_handler(signal.SIGINT)


def _interrupted(progress: client.Progress) -> None:
    progress.stop.set()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # a second one ends us


class _Shown:
    """Redraws the bar a few times a second, as long as the replay lasts."""

    def __init__(self, bar: Progress, task: TaskID, progress: client.Progress) -> None:
        self._bar, self._task, self._progress = bar, task, progress
        self._next: asyncio.TimerHandle | None = None

    def refresh(self) -> None:
        progress = self._progress
        state = f"{progress.in_flight:,} in flight, {progress.failed:,} failed"
        ended = progress.completed + progress.failed
        self._bar.update(self._task, completed=ended, state=state)
        self._bar.refresh()
        self._next = asyncio.get_running_loop().call_later(_PROGRESS_PERIOD_S, self.refresh)

    def end(self) -> None:
        if self._next is not None:
            self._next.cancel()


def _vocabulary(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigInvalid(field="vocabulary", value=text, remedy="write it like 32:255")
    return int(first), int(last)


def _slo_class(text: str | None) -> SloClass | None:
    if text is None or text in SLO_CLASSES:
        return text
    raise ConfigInvalid(field="class", value=text, remedy=f"use one of {', '.join(SLO_CLASSES)}")


def _targets(texts: list[str]) -> dict[SloClass, SloTarget]:
    targets: dict[SloClass, SloTarget] = {}
    for text in texts:
        name, _, values = text.partition("=")
        ttft_text, _, tpot_text = values.partition(",")
        try:
            target = SloTarget(ttft_s=float(ttft_text) / 1000, tpot_s=float(tpot_text) / 1000)
        except ValueError:
            remedy = "write it like interactive=500,50: TTFT and TPOT in ms"
            raise ConfigInvalid(field="target", value=text, remedy=remedy) from None
        slo_class = _slo_class(name)
        assert slo_class is not None
        targets[slo_class] = target
    return targets


def _command() -> str:
    """This process's command line, without the secret in it."""
    words = list(sys.argv)
    for place, word in enumerate(words):
        if word == "--api-key" and place + 1 < len(words):
            words[place + 1] = "..."
        elif word.startswith("--api-key="):
            words[place] = "--api-key=..."
    return shlex.join(words)
