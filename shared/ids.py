"""Where identities come from: random in production, counted in simulation.

An id is one token of a subject, so it holds no dot, blank or wildcard.
"""

import re
import secrets
from typing import Protocol

from shared.errors import ConfigInvalid

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class IdSource(Protocol):
    def next(self, prefix: str) -> str: ...


class RandomIds:
    """Unpredictable start, then a counter: unique across processes, cheap per request."""

    def __init__(self) -> None:
        self._base = secrets.token_hex(6)
        self._count = 0

    def next(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}-{self._base}{self._count:x}"


class CountedIds:
    def __init__(self) -> None:
        self._count = 0

    def next(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}-{self._count}"


def checked_id(field: str, value: str) -> str:
    """``value`` if it can be a subject token; raises ConfigInvalid."""
    if not _TOKEN.fullmatch(value):
        raise ConfigInvalid(
            field=field, value=value, remedy="use 1 to 64 letters, digits, '-' and '_'"
        )
    return value
