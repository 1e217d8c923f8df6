"""Makes small checkpoints, in a process of its own: deploy may not import services."""

import asyncio
import sys
from pathlib import Path

from shared.errors import OServeError

_MODULE = "services.worker.engine.torch_engine.make_model"


class ModelNotMade(OServeError):
    """The checkpoint could not be written; says why."""


def is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists()


async def make_model(folder: Path, size: str) -> None:
    """Write a checkpoint with random weights into a new folder; raises ModelNotMade."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _MODULE, str(folder), "--size", size),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode or not is_checkpoint(folder):
        words = output.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ModelNotMade(f"cannot make a {size} model at {folder}: {words[-1]}")
