"""What a running mesh leaves in its data folder: the lock, and how to reach it."""

import fcntl
import os
from pathlib import Path
from typing import IO

import msgspec

from deploy.config import STATE_DIR
from shared.errors import ConfigInvalid

_LOCK = "lock"
_MESH = "mesh.json"


class MeshFile(msgspec.Struct, frozen=True, kw_only=True):
    """``mesh.json``: written once the broker answers, removed at the end."""

    name: str
    pid: int
    url: str
    bus_url: str
    topology: str
    log_dir: str
    started_unix_s: float


class DataDirLock:
    """At most one supervisor per data folder.

    The lock is the kernel's (flock), so it ends with its owner however that dies; the pid inside
    is only for people.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / _LOCK
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Raises ConfigInvalid, naming the owner, when another mesh runs in the folder."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigInvalid(
                field="up.data_dir",
                value=str(self._path.parent),
                remedy=f"cannot be written ({error.strerror}): name another folder",
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "?"
            file.close()
            raise ConfigInvalid(
                field="up.data_dir",
                value=str(self._path.parent),
                remedy=f"a mesh runs in it already (pid {owner}): stop that one, or give this one "
                "its own folder with --set up.data_dir=DIR",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def is_locked(data_dir: Path) -> bool:
    """Whether a supervisor lives in the folder; a pid would not tell, since pids are reused."""
    try:
        with (data_dir / _LOCK).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_mesh_file(data_dir: Path, content: MeshFile) -> None:
    """Whole or not at all: readers never see half of it."""
    draft = data_dir / f"{_MESH}.new"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    draft.replace(data_dir / _MESH)


def remove_mesh_file(data_dir: Path) -> None:
    (data_dir / _MESH).unlink(missing_ok=True)


def read_mesh_file(data_dir: Path) -> MeshFile | None:
    """None when there is none, or it is not ours to read."""
    try:
        return msgspec.json.decode((data_dir / _MESH).read_bytes(), type=MeshFile)
    except (OSError, msgspec.DecodeError):
        return None


def running_meshes(parent: Path = STATE_DIR) -> list[MeshFile]:
    """The meshes whose supervisors live, of all data folders below ``parent``."""
    folders = [path.parent for path in sorted(parent.glob(f"*/{_MESH}"))]
    found = [read_mesh_file(folder) for folder in folders if is_locked(folder)]
    return [mesh for mesh in found if mesh is not None]
