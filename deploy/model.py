"""Makes small checkpoints, in a process of its own: deploy may not import services."""

import asyncio
import shutil
import sys
from pathlib import Path

from shared.errors import OServeError

_MODULE = "services.worker.engine.torch_engine.make_model"


class ModelNotMade(OServeError):
    """The checkpoint could not be written; says why."""


def is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists()


async def make_model(folder: Path, size: str) -> None:
    """Write a checkpoint with random weights into a new folder; raises ModelNotMade.

    It is written beside its place and moved there whole, so that an interrupted first start does
    not leave half a checkpoint, which the next start would take for one.
    """
    _require_new(folder)
    draft = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    code, words = await _write(draft, size)
    if code or not is_checkpoint(draft):
        shutil.rmtree(draft, ignore_errors=True)
        raise ModelNotMade(f"cannot make a {size} model at {folder}: {words}")
    draft.replace(folder)


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelNotMade(f"{folder} exists and is no empty folder: name a new one")


async def _write(folder: Path, size: str) -> tuple[int, str]:
    """Exit code and last words of the process that writes it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _MODULE, str(folder), "--size", size),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for us to pass on
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    lines = output.decode(errors="replace").strip().splitlines()
    assert process.returncode is not None
    return process.returncode, lines[-1] if lines else "it said nothing"
