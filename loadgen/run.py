"""One replay from trace to report, for callers in Python; the command line is loadgen.replay."""

import asyncio
import resource
import time
from importlib import metadata

import msgspec

from loadgen import client
from loadgen.client import ClientOptions
from loadgen.probe import ServerUnreachable, served_models
from loadgen.report import About, Report, build_report
from loadgen.workload.arrivals import Selection, select
from loadgen.workload.generator import generate
from loadgen.workload.readers import read_trace
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid
from shared.slo import SloClass, SloTarget

GENERATOR = "generator"
GENERATED_S = 120.0  # how long the generator's run is when no duration is given
_FILES_KEPT = 64  # for what is open besides connections


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replay. ``trace`` is a path, or ``generator`` for the built-in workload; without
    ``model`` the first that the server lists is used."""

    trace: str
    url: str
    selection: Selection = msgspec.field(default_factory=Selection)
    model: str = ""
    api_key: str = ""
    slo_class: SloClass | None = None
    seed: int = 0
    timeout_s: float = 600.0
    connections_max: int = 8192
    vocabulary_min: int = 32
    vocabulary_max: int = 255
    targets: dict[SloClass, SloTarget] = {}  # msgspec copies an empty default
    command: str = ""


def load_arrivals(options: ReplayOptions) -> list[TraceRecord]:
    """The requests to send. Raises TraceInvalid, NothingSelected or ConfigInvalid."""
    selection = options.selection
    if options.trace == GENERATOR:
        duration_s = selection.start_s + (selection.duration_s or GENERATED_S)
        return select(generate(duration_s=duration_s, seed=options.seed), selection)
    return select(read_trace(options.trace), selection)


async def run_replay(options: ReplayOptions, *, progress: client.Progress | None = None) -> Report:
    """Replay and report; raises OServeError when it cannot begin."""
    arrivals = await asyncio.to_thread(load_arrivals, options)
    return await replay_arrivals(arrivals, options, progress=progress)


async def replay_arrivals(
    arrivals: list[TraceRecord],
    options: ReplayOptions,
    *,
    progress: client.Progress | None = None,
) -> Report:
    """``run_replay`` for requests that the caller made."""
    allow_connections(min(options.connections_max, len(arrivals)))
    models = await served_models(options.url, api_key=options.api_key)
    model = options.model or (models[0] if models else "")
    if model not in models:
        served = ", ".join(models) or "none yet"
        raise ServerUnreachable(f"{options.url} does not serve {model!r}; it serves: {served}")
    progress = progress or client.Progress()
    started_unix_s = time.time()
    seen = await client.replay(
        arrivals,
        ClientOptions(
            url=options.url,
            model=model,
            api_key=options.api_key,
            slo_class=options.slo_class,
            seed=options.seed,
            timeout_s=options.timeout_s,
            connections_max=options.connections_max,
            vocabulary_min=options.vocabulary_min,
            vocabulary_max=options.vocabulary_max,
        ),
        progress=progress,
    )
    about = About(
        command=options.command,
        trace=options.trace,
        url=options.url,
        model=model,
        started_unix_s=started_unix_s,
        oserve_version=metadata.version("oserve"),
        options=_shown(options),
    )
    return await asyncio.to_thread(
        build_report,
        seen,
        about,
        targets=options.targets,
        planned=len(arrivals),
        in_flight_max=progress.in_flight_max,
    )


def allow_connections(count: int) -> None:
    """Raise this process's soft limit of open files to hold ``count`` connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _FILES_KEPT
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigInvalid(
            field="concurrency-max",
            value=count,
            remedy=f"this process may open {hard} files; raise `ulimit -Hn` to {wanted}, "
            f"or use at most {hard - _FILES_KEPT}",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _shown(options: ReplayOptions) -> dict[str, str | int | float | bool | None]:
    """Every setting but the secret, flat."""
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in msgspec.structs.asdict(options).items():
        if name in ("api_key", "command", "targets", "selection"):
            continue
        flat[name] = value
    return flat | {
        name: value
        for name, value in msgspec.structs.asdict(options.selection).items()
        if name not in flat
    }
