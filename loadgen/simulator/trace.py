"""What happened in a run: its newest part in words, all of it as a digest."""

import hashlib
from collections import deque
from typing import Any

from shared.core import Query
from shared.messages.base import DataMessage, Message, encode


class Trace:
    def __init__(self, lines_max: int) -> None:
        self._newest: deque[tuple[float, str, Any]] = deque(maxlen=lines_max)
        self._digest = hashlib.blake2b(digest_size=16)

    def note(self, now_s: float, node: str, text: str) -> None:
        """Add a remark; it is no part of the digest."""
        self._newest.append((now_s, node, text))

    def record(self, now_s: float, node: str, event: Any) -> None:  # noqa: ANN401  # any core's event
        self._newest.append((now_s, node, event))
        message = event.message if isinstance(event, Query) else event
        said = encode(message) if isinstance(message, Message | DataMessage) else b""
        self._digest.update(f"{now_s!r} {node} {type(event).__name__} ".encode() + said)

    @property
    def digest(self) -> str:
        """Of all that was recorded: equal runs have equal digests."""
        return self._digest.hexdigest()

    def lines(self) -> list[str]:
        """The newest happenings, formatted only now since most are never read."""
        return [f"{now_s:9.4f}  {node}{_words(what)}" for now_s, node, what in self._newest]


def _words(what: Any) -> str:  # noqa: ANN401  # any core's event
    """The same in every run: a function's address is not."""
    if isinstance(what, str):
        return f": {what}"
    return f" <- {what.__qualname__}" if callable(what) else f" <- {what!r}"
