"""Azure LLM inference traces (AzurePublicDataset), 2023 and 2024.

Both have the columns TIMESTAMP, ContextTokens, GeneratedTokens. 2023 writes local wall time with
seven decimals (``2023-11-16 18:17:03.9799600``), 2024 a time zone and up to six decimals, none
when they are zero (``2024-05-10 00:00:00.009930+00:00``). Time 0 is the first row.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from loadgen.workload.formats.table import Row, read_rows
from loadgen.workload.records import TraceRecord

NAME = "azure"
_TIMESTAMP, _INPUT, _OUTPUT = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
_WALL_TIME = re.compile(
    r"^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?$", re.ASCII
)


def recognises(header: Sequence[str]) -> bool:
    return {_TIMESTAMP, _INPUT, _OUTPUT} <= set(header)


def read(
    path: Path, header: Sequence[str], lines: Iterator[tuple[int, str]]
) -> Iterator[TraceRecord]:
    clock = _Clock()
    for row in read_rows(path, header, lines):
        yield TraceRecord(
            timestamp_s=clock.seconds(row),
            input_tokens=row.tokens(_INPUT),
            output_tokens=row.tokens(_OUTPUT),
        )


class _Clock:
    """Seconds since the first row. Rows of one second share a parse: there are millions."""

    def __init__(self) -> None:
        self._origin: tuple[int, float] | None = None
        self._second_text = ("", "", "")
        self._second = 0

    def seconds(self, row: Row) -> float:
        text = row.text(_TIMESTAMP)
        match = _WALL_TIME.match(text)
        if match is None:
            raise row.place.error(
                _TIMESTAMP, f"{text!r} is not a time such as 2023-11-16 18:17:03.9799600"
            )
        day, time, fraction_text, zone = match.groups()
        if (day, time, zone or "") != self._second_text:
            self._second = self._parse(row, f"{day}T{time}{zone or ''}")
            self._second_text = (day, time, zone or "")
        fraction = float(fraction_text) if fraction_text else 0.0
        if self._origin is None:
            self._origin = (self._second, fraction)
        # Whole seconds and fractions apart: a double cannot hold 1.7e9 s to 100 ns.
        since_s = (self._second - self._origin[0]) + (fraction - self._origin[1])
        if since_s < 0:
            raise row.place.error(_TIMESTAMP, f"{text} is before the first row's time; sort rows")
        return since_s

    @staticmethod
    def _parse(row: Row, text: str) -> int:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise row.place.error(_TIMESTAMP, f"{text!r} is not a time: {error}") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp())
