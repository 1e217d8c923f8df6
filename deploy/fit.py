"""Fits and judges cost profiles in a process of its own: deploy may not import services."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_MODULE = "services.profiler"
_ROOT = Path(__file__).resolve().parent.parent


def run_profiler(arguments: Sequence[str]) -> int:
    """Exit status of the profiler's command; its output goes where ours goes."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = (sys.executable, "-m", _MODULE, *arguments)
    try:
        return subprocess.run(command, env=environ, check=False).returncode
    except KeyboardInterrupt:  # the child has had it too
        return 130


def fit(
    *, model: Path | None, gpus: Sequence[str], out: Path, tables: Path | None, name: str
) -> int:
    """Exit status of fitting ``model``, or all shipped ones, on ``gpus`` (none: on all)."""
    arguments = ["fit", "--out", str(out)]
    arguments += [word for gpu in gpus for word in ("--gpu", gpu)]
    for option, value in (("--model", model), ("--tables", tables), ("--name", name)):
        if value:
            arguments += [option, str(value)]
    return run_profiler(arguments)


def validate(*, tables: Path | None, as_json: bool) -> int:
    """Exit status of comparing the shipped profiles with measurements."""
    arguments = ["validate"]
    if tables is not None:
        arguments += ["--tables", str(tables)]
    return run_profiler([*arguments, *(["--json"] if as_json else [])])
