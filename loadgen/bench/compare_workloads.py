"""The workloads of the study, as trace files in a cache folder; what cannot be had, and why.

ServeGen's windows are drawn by ``servegen_sample.py``, a tool outside of this project, from tables
of each client's rate and lengths. It is asked for twice the scale that a load needs, and each seed
keeps every second request: so clients are nearly as bursty as the tool makes them (thinning one
large draw to every load would smooth them), and seeds differ.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loadgen.workload.arrivals import Selection, select
from loadgen.workload.formats import native
from loadgen.workload.readers import read_trace
from loadgen.workload.sweeps import SPATIAL, TEMPORAL, sweep

TRACES = Path(os.environ.get("OSERVE_TRACES", "../shared/traces"))
TOOLS = Path(os.environ.get("OSERVE_TOOLS", "../shared/tools"))
HOUR_S = 3600.0
SWEEP_RPS = 100.0  # more than any deployment here bears: seeds thin it
PROBE_SCALE = 0.5  # of ServeGen's rates, on which saturation is looked for
THREE_PROBE_SCALE = 0.25  # the same of three models, of which two have many short requests
KEPT = 0.5  # of what is drawn for a load
DRAW_TIMEOUT_S = 1800.0
_AZURE, _MOONCAKE = "azure2023_code_conv.csv.gz", "mooncake_conversation.jsonl.gz"
_SAMPLER = "servegen_sample.py"


class Unavailable(Exception):
    """A workload cannot be had here; says what is missing."""


@dataclass(frozen=True, slots=True)
class Offered:
    """Trace files by model, and the rate scale at which they make up the load asked for."""

    traces: Mapping[str, str]
    rate_scale: float


Files = Callable[[Path, tuple[str, ...], float | None], Offered]
"""The traces of these models in a cache folder, made if need be: for a rate scale, relative to what
None gives. May raise Unavailable."""


@dataclass(frozen=True, slots=True)
class StudyWorkload:
    """``models``: that it is for; none: whichever the study has, one at a time."""

    name: str
    about: str
    files: Files
    models: tuple[str, ...] = ()


def _file(name: str) -> Files:
    def files(cache: Path, models: tuple[str, ...], scale: float | None) -> Offered:
        del cache
        path = TRACES / name
        if not path.exists():
            raise Unavailable(f"no {name} in {TRACES} (OSERVE_TRACES)")
        return Offered(dict.fromkeys(models, str(path)), scale or 1.0)

    return files


def _swept(level: str) -> Files:
    def files(cache: Path, models: tuple[str, ...], scale: float | None) -> Offered:
        source = TRACES / _AZURE
        if not source.exists():
            raise Unavailable(f"no {_AZURE} in {TRACES} (OSERVE_TRACES), of which it is made")
        path = cache / f"sweep-{level}-{SWEEP_RPS:g}.csv.gz"
        if not path.exists():
            records = select(read_trace(source), Selection())
            arrivals = sweep(records, level, rps=SWEEP_RPS, duration_s=HOUR_S, seed=1)
            _written(path, lambda part: native.write(arrivals, part))
        return Offered(dict.fromkeys(models, str(path)), scale or 1.0)

    return files


def _servegen(start_s: int, pools: tuple[str, ...], *, probe: float = PROBE_SCALE) -> Files:
    """``pools``: one for all models, or one for each in their order."""

    def files(cache: Path, models: tuple[str, ...], scale: float | None) -> Offered:
        drawn = probe if scale is None else float(f"{probe * scale / KEPT:.4g}")
        kept = 1.0 if scale is None else probe * scale / drawn
        own = pools if len(pools) == len(models) else pools * len(models)
        paths = [_drawn(cache, pool, start_s, drawn) for pool in own]
        return Offered({m: str(p) for m, p in zip(models, paths, strict=True)}, kept)

    return files


def _drawn(cache: Path, pool: str, start_s: int, scale: float) -> Path:
    path = cache / f"servegen-{pool}-{start_s}-{scale:g}.csv.gz"
    if path.exists():
        return path
    tables, tool = TRACES / "servegen", TOOLS / _SAMPLER
    if not (tables / f"{pool}_rates.csv.gz").exists():
        raise Unavailable(f"no tables of {pool} in {tables} (OSERVE_TRACES)")
    if not tool.exists():
        raise Unavailable(f"no {_SAMPLER} in {TOOLS} (OSERVE_TOOLS)")
    python = os.environ.get("OSERVE_TOOLS_PYTHON", sys.executable)
    command = [python, str(tool), "--dir", str(tables), "--pool", pool, "--start", str(start_s)]
    command += ["--end", f"{start_s + HOUR_S:g}", "--scale", f"{scale:g}", "--seed", "1", "--out"]

    def draw(part: Path) -> None:
        done = subprocess.run(
            [*command, str(part)], capture_output=True, timeout=DRAW_TIMEOUT_S, check=False
        )
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise Unavailable(
                f"{_SAMPLER} failed: {''.join(last)} (it needs pandas: name a Python that has it "
                "in OSERVE_TOOLS_PYTHON)"
            )

    _written(path, draw)
    return path


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Beside and renamed, so that an interrupted file is never read; ``.gz`` last for who looks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


THREE = ("llama-3.1-70b", "qwen2.5-32b", "llama-3.1-8b")
WINDOWS_S = (841_800, 846_600, 351_000)
"""Hours of ServeGen's m-large whose mix moves much."""

WORKLOADS: Mapping[str, StudyWorkload] = {
    workload.name: workload
    for workload in (
        StudyWorkload("azure", "the Azure 2023 hour, code and conversation", _file(_AZURE)),
        *(
            StudyWorkload(
                f"m-large-{start_s}",
                f"an hour of ServeGen's m-large from its second {start_s:,} on",
                _servegen(start_s, ("m-large",)),
            )
            for start_s in WINDOWS_S
        ),
        StudyWorkload(
            "mooncake", "the Mooncake conversation hour, whose mix stands still", _file(_MOONCAKE)
        ),
        *(
            StudyWorkload(
                level, f"a stationary mix whose shares vary by {cv:g} (sweeps.py)", _swept(level)
            )
            for level, cv in SPATIAL.items()
        ),
        *(
            StudyWorkload(
                level,
                f"a mix that swings {swing.amplitude:.0%} of the way each {swing.period_s:g} s",
                _swept(level),
            )
            for level, swing in TEMPORAL.items()
        ),
        StudyWorkload(
            "three-models",
            f"ServeGen's m-large, m-mid and m-small from second {WINDOWS_S[0]:,} on, scaled alike",
            _servegen(WINDOWS_S[0], ("m-large", "m-mid", "m-small"), probe=THREE_PROBE_SCALE),
            models=THREE,
        ),
    )
}
