"""BurstGPT traces: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``.

Later releases add ``Session ID`` and ``Elapsed time``. The timestamp is in seconds from the
start of the collection. A request whose response has 0 tokens failed when it was recorded; it is
kept, since its client did ask. The label is the log type (``conversation`` or ``api``).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from loadgen.workload.formats.table import read_rows
from loadgen.workload.records import TraceRecord

NAME = "burstgpt"
_TIMESTAMP, _INPUT, _OUTPUT = "Timestamp", "Request tokens", "Response tokens"
_LOG_TYPE, _SESSION = "Log Type", "Session ID"


def recognises(header: Sequence[str]) -> bool:
    return {_TIMESTAMP, _INPUT, _OUTPUT} <= set(header)


def read(
    path: Path, header: Sequence[str], lines: Iterator[tuple[int, str]]
) -> Iterator[TraceRecord]:
    for row in read_rows(path, header, lines):
        yield TraceRecord(
            timestamp_s=row.seconds(_TIMESTAMP),
            input_tokens=row.tokens(_INPUT),
            output_tokens=row.tokens(_OUTPUT),
            label=row.optional(_LOG_TYPE).lower().removesuffix(" log"),
            session=row.optional(_SESSION),
        )
