"""TCP ports of this machine: a free one, a taken one, and who has it."""

import socket
from pathlib import Path

from shared.errors import ConfigInvalid

_LISTEN = "0A"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now; somebody else may take it before we do."""
    with socket.create_server((host, 0), family=_family(host)) as server:
        return server.getsockname()[1]


def require_free(host: str, port: int, *, field: str, remedy: str) -> None:
    """Raises ConfigInvalid, naming the port and who has it, unless we could listen on it."""
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        owner = owner_of(port)
        by = f" by {owner}" if owner else ""
        why = f"already taken{by}" if _taken(host, port) else f"{error.strerror} on {host}"
        raise ConfigInvalid(field=field, value=port, remedy=f"{why}; {remedy}") from None


def _taken(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return owner_of(port) != ""


def owner_of(port: int) -> str:
    """``name (pid n)`` of the process that listens on ``port``; "" when it cannot be told, as
    for other users' processes."""
    inodes = _listening_inodes(port)
    if not inodes:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        if inodes & _socket_inodes(process):
            return f"{_process_name(process)} (pid {process.name})"
    return "another user's process"


def _listening_inodes(port: int) -> set[str]:
    found: set[str] = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():  # not Linux, or no IPv6
            continue
        for line in table.read_text().splitlines()[1:]:
            columns = line.split()
            local, state, inode = columns[1], columns[3], columns[9]
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                found.add(inode)
    return found


def _socket_inodes(process: Path) -> set[str]:
    found: set[str] = set()
    try:
        for descriptor in (process / "fd").iterdir():
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # it ended meanwhile, or is another user's
        return found
    return found


def _process_name(process: Path) -> str:
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "a process that just ended"
    words = [Path(arguments[0].decode(errors="replace")).name]
    if b"-m" in arguments:
        words += [a.decode(errors="replace") for a in arguments[arguments.index(b"-m") :][:2]]
    return " ".join(words)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
