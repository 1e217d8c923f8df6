"""What a process holds now: open file descriptors and resident memory, from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    fds: int
    rss_bytes: int


def usage_of(pid: int) -> Usage:
    """Raises FileNotFoundError when the process is gone."""
    process = Path("/proc") / str(pid)
    resident_pages = int((process / "statm").read_text().split()[1])
    return Usage(fds=len(list((process / "fd").iterdir())), rss_bytes=resident_pages * _PAGE_BYTES)


def open_files_of(pid: int) -> list[str]:
    """What each descriptor is, for a test that has found one too many."""
    folder = Path("/proc") / str(pid) / "fd"
    return sorted(_target(path) for path in folder.iterdir())


def _target(path: Path) -> str:
    try:
        return f"{path.name} {path.readlink()}"
    except FileNotFoundError:
        return f"{path.name} closed meanwhile"
