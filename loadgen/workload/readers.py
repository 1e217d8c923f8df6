"""Opens a trace of any known format, told by its content and never by its name."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from loadgen.workload.formats import azure, burstgpt, mooncake, native
from loadgen.workload.lines import read_lines, split_row
from loadgen.workload.records import TraceInvalid, TraceRecord

_TABLES = (native, azure, burstgpt)
FORMATS = (*(table.NAME for table in _TABLES), mooncake.NAME)


def read_trace(path: Path | str) -> Iterator[TraceRecord]:
    """A trace's records in file order, one at a time; raises TraceInvalid where it is wrong."""
    return open_trace(path)[1]


def open_trace(path: Path | str) -> tuple[str, Iterator[TraceRecord]]:
    """The name of a trace's format, and its records."""
    path = Path(path)
    lines = read_lines(path)
    number, first = next(lines, (0, ""))
    if not first:
        raise TraceInvalid("the file holds no requests", path=path)
    if first.startswith("{"):
        if mooncake.recognises(first):
            return mooncake.NAME, mooncake.read(path, chain([(number, first)], lines))
        problem = "JSON lines need the fields timestamp, input_length and output_length"
        raise TraceInvalid(problem, path=path, line=number)
    header = split_row(first)
    for table in _TABLES:
        if table.recognises(header):
            return table.NAME, table.read(path, header, lines)
    raise TraceInvalid(
        f"the header {first[:120]!r} is none of: timestamp_s,input_tokens,output_tokens (ours); "
        "TIMESTAMP,ContextTokens,GeneratedTokens (Azure); "
        "Timestamp,Model,Request tokens,Response tokens,... (BurstGPT)",
        path=path,
        line=number,
    )
