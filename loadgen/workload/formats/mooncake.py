"""Mooncake traces: JSON lines with a timestamp in milliseconds and a hash for each prompt block.

``{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, ...]}``.
Each hash id stands for 512 tokens of the prompt (the last one for what is left) and for all the
tokens before them, so equal leading ids mean an equal beginning of the prompt.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from loadgen.workload.records import TOKENS_MAX, Place, TraceRecord

NAME = "mooncake"


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


_decoder = msgspec.json.Decoder(_Line)
_any_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def recognises(first_line: str) -> bool:
    try:
        fields = _any_decoder.decode(first_line)
    except msgspec.DecodeError:
        return False
    return {"timestamp", "input_length", "output_length"} <= set(fields)


def read(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRecord]:
    for number, text in lines:
        place = Place(path, number)
        try:
            line = _decoder.decode(text)
        except msgspec.ValidationError as error:
            problem, _, column = str(error).partition(" - at `$.")
            raise place.error(column.rstrip("`") or None, problem) from None
        except msgspec.DecodeError as error:
            raise place.error(None, f"not a JSON object: {error}") from None
        _check(place, line)
        yield TraceRecord(
            timestamp_s=line.timestamp / 1000.0,
            input_tokens=line.input_length,
            output_tokens=line.output_length,
            hash_ids=place.hash_ids("hash_ids", line.hash_ids),
        )


def _check(place: Place, line: _Line) -> None:
    if line.timestamp < 0:
        raise place.error("timestamp", f"{line.timestamp} is before the trace's time 0")
    for column, tokens in (
        ("input_length", line.input_length),
        ("output_length", line.output_length),
    ):
        if not 0 <= tokens <= TOKENS_MAX:
            raise place.error(column, f"{tokens} tokens is not between 0 and {TOKENS_MAX}")
