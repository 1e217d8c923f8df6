"""Log files of bounded size, written by the supervisor for processes that log to a pipe."""

from collections import deque
from pathlib import Path
from typing import IO

TAIL_BYTES_MAX = 16 << 10


class RotatingLog:
    """Appends whole chunks; at ``bytes_max`` the next line starts a new file.

    The newest file has the plain name; ``.1`` is the one before it. Restarts of a process go on in
    the same file, so its story stays in one place.
    """

    def __init__(self, path: Path, *, bytes_max: int, files_max: int) -> None:
        self.path = path
        self._bytes_max, self._files_max = bytes_max, files_max
        self._file: IO[bytes] = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    def write(self, chunk: bytes) -> None:
        self._remember(chunk)
        if self._size >= self._bytes_max:
            cut = chunk.find(b"\n") + 1
            if cut:  # otherwise one line longer than the chunk: it stays whole
                self._file.write(chunk[:cut])
                self._rotate()
                chunk = chunk[cut:]
        self._file.write(chunk)
        self._size += len(chunk)

    def tail(self) -> list[str]:
        """The newest lines that were written through this object."""
        return b"".join(self._tail).decode(errors="replace").splitlines()

    def forget_tail(self) -> None:
        """So that a new process does not answer for its predecessor's last words."""
        self._tail.clear()
        self._tail_size = 0

    def close(self) -> None:
        self._file.close()

    def _remember(self, chunk: bytes) -> None:
        self._tail.append(chunk[-TAIL_BYTES_MAX:])
        self._tail_size += len(self._tail[-1])
        while self._tail_size - len(self._tail[0]) >= TAIL_BYTES_MAX:
            self._tail_size -= len(self._tail.popleft())

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._files_max, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path.with_name(f"{self.path.name}.{number - 1}") if number > 1 else None
            source = newer or self.path
            if source.exists():
                source.replace(older)
        self._file = self.path.open("ab", buffering=0)
        self._size = 0


def last_words(lines: list[str]) -> str:
    """What a process said last in words: its JSON lines are for machines, the rest is why it
    ended."""
    words = [line for line in lines if line.strip() and not line.startswith("{")]
    return words[-1] if words else (lines[-1] if lines else "it said nothing")
