"""Runs the sweep of an engine in a process of its own: deploy may not import services, and vLLM may
live in another environment, whose interpreter then runs it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigInvalid

_MODULE = "services.worker.measure"
_ROOT = Path(__file__).resolve().parent.parent

ENVIRON = {
    "OMP_NUM_THREADS": "1",  # as many as the workers will have: set it for more
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its steps in this process, where they can be timed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it wants a NUMA node for each engine
    "TORCH_COMPILE_DISABLE": "1",  # steps must not wait for a compiler
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""What torch and vLLM read when they are imported; whoever set one of them has the last word."""


def run_measure(arguments: Sequence[str], *, python: str = "") -> int:
    """The sweep's exit status; its output goes where ours goes. ``python``: an interpreter, by
    path or name. Raises ConfigInvalid if there is none."""
    interpreter = shutil.which(python) if python else sys.executable
    if not interpreter:
        raise ConfigInvalid(
            field="--python", value=python, remedy="name an interpreter, such as venv/bin/python"
        )
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**ENVIRON, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = (interpreter, "-m", _MODULE, *arguments)
    try:
        return subprocess.run(command, env=environ, check=False).returncode
    except KeyboardInterrupt:  # the child has had it too
        return 130
