"""One request of a trace, and the error that says where a trace is wrong."""

import math
from pathlib import Path

import msgspec

from shared.errors import OServeError
from shared.slo import SloClass

HASH_BLOCK_TOKENS = 512
"""Tokens behind one hash id in Mooncake's published traces."""

TOKENS_MAX = 16_777_216
"""No published trace comes near; a larger length is a shifted column or a wrong unit."""


HASH_ID_MAX = 2**63 - 1


class TraceRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """When a request arrived and how long it was; never what it said.

    ``timestamp_s`` counts on the trace's own clock. Two records whose ``hash_ids`` begin with the
    same ids began with the same tokens, ``hash_block_tokens`` for each id.
    """

    timestamp_s: float
    input_tokens: int
    output_tokens: int
    label: str = ""  # the trace's own word for the kind of request: code, conv, api ...
    slo_class: SloClass | None = None
    tenant: str = ""
    session: str = ""
    hash_ids: tuple[int, ...] = ()
    hash_block_tokens: int = HASH_BLOCK_TOKENS


class TraceInvalid(OServeError):
    """A trace cannot be read; says in which file, line and column, and what would be right."""

    def __init__(
        self, problem: str, *, path: Path | str, line: int | None = None, column: str | None = None
    ) -> None:
        self.problem, self.path, self.line, self.column = problem, str(path), line, column
        where = str(path)
        if line is not None:
            where += f", line {line}"
        if column is not None:
            where += f", column {column}"
        super().__init__(f"{where}: {problem}")


class Place:
    """A line of a file; its methods turn the text of a column into a value or a TraceInvalid."""

    __slots__ = ("line", "path")

    def __init__(self, path: Path | str, line: int) -> None:
        self.path, self.line = path, line

    def error(self, column: str | None, problem: str) -> TraceInvalid:
        return TraceInvalid(problem, path=self.path, line=self.line, column=column)

    def tokens(self, column: str, text: str) -> int:
        """A token count. ``374.0`` is accepted, as pandas writes integers beside empty cells."""
        try:
            value = int(text)
        except ValueError:
            number = self._number(column, text, "a whole number of tokens")
            if not number.is_integer():
                raise self.error(column, f"{text!r} is not a whole number of tokens") from None
            value = int(number)
        if not 0 <= value <= TOKENS_MAX:
            raise self.error(column, f"{value} tokens is not between 0 and {TOKENS_MAX}")
        return value

    def seconds(self, column: str, text: str) -> float:
        value = self._number(column, text, "a number of seconds")
        if value < 0:
            raise self.error(column, f"{text} is before the trace's time 0")
        return value

    def hash_ids(self, column: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if ids and not 0 <= min(ids) <= max(ids) <= HASH_ID_MAX:
            raise self.error(column, "an id is not between 0 and 2^63 - 1")
        return ids

    def _number(self, column: str, text: str, what: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self.error(column, f"{text!r} is not {what}") from None
        if not math.isfinite(value):
            raise self.error(column, f"{text!r} is not {what}")
        return value
