"""Where a measurement was made: without it a number means nothing."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """``commit`` ends in "+" when files differ from it, and is "unknown" outside a clone."""

    commit: str
    cpu: str
    cores: int  # those this process may use
    memory_bytes: int
    python: str
    system: str


def environment() -> Environment:
    return Environment(
        commit=_commit(),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()}",
    )


def _commit() -> str:
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    """What git prints, or None where there is no git or no commit."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
