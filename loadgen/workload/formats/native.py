"""Our own format: CSV with ``timestamp_s,input_tokens,output_tokens`` and what else is known.

Further columns that mean something: ``service`` (or ``label``, ``type``), ``slo_class`` (or
``class``), ``tenant`` (or ``client``), ``session``, ``hash_ids`` (separated by blanks) with
``hash_block_tokens``. Any other column is ignored.
"""

import gzip
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast, get_args

from loadgen.workload.formats.table import Row, read_rows
from loadgen.workload.records import HASH_BLOCK_TOKENS, TraceRecord
from shared.errors import ConfigInvalid
from shared.slo import SloClass

NAME = "oserve"
_TIMESTAMP, _INPUT, _OUTPUT = "timestamp_s", "input_tokens", "output_tokens"
_WRITTEN = (
    *(_TIMESTAMP, _INPUT, _OUTPUT),
    *("service", "slo_class", "tenant", "session", "hash_ids", "hash_block_tokens"),
)
_LABELS = ("service", "label", "type")
_CLASSES = ("slo_class", "class")
_TENANTS = ("tenant", "client")


def recognises(header: Sequence[str]) -> bool:
    return {_TIMESTAMP, _INPUT, _OUTPUT} <= set(header)


def read(
    path: Path, header: Sequence[str], lines: Iterator[tuple[int, str]]
) -> Iterator[TraceRecord]:
    label_column, class_column, tenant_column = (
        next((name for name in names if name in header), names[0])
        for names in (_LABELS, _CLASSES, _TENANTS)
    )
    for row in read_rows(path, header, lines):
        block_text = row.optional("hash_block_tokens")
        yield TraceRecord(
            timestamp_s=row.seconds(_TIMESTAMP),
            input_tokens=row.tokens(_INPUT),
            output_tokens=row.tokens(_OUTPUT),
            label=row.optional(label_column),
            slo_class=_slo_class(row, class_column),
            tenant=row.optional(tenant_column),
            session=row.optional("session"),
            hash_ids=_hash_ids(row),
            hash_block_tokens=(
                max(1, row.tokens("hash_block_tokens")) if block_text else HASH_BLOCK_TOKENS
            ),
        )


def write(records: Iterable[TraceRecord], path: Path) -> int:
    """Write ``records`` in this format, gzip when the name ends in ``.gz``; returns how many."""
    count = 0
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(",".join(_WRITTEN) + "\n")
        for record in records:
            file.write(_row_text(record) + "\n")
            count += 1
    return count


def _row_text(record: TraceRecord) -> str:
    cells = (
        *(repr(record.timestamp_s), str(record.input_tokens), str(record.output_tokens)),
        *(_quoted(text) for text in (record.label, record.slo_class or "", record.tenant)),
        _quoted(record.session),
        " ".join(map(str, record.hash_ids)),
        str(record.hash_block_tokens),
    )
    return ",".join(cells)


def _quoted(text: str) -> str:
    if text != text.strip() or len(text.splitlines()) > 1:
        raise ConfigInvalid(
            field="record", value=text, remedy="a text cell cannot hold line breaks or outer blanks"
        )
    if "," in text or '"' in text:
        doubled = text.replace('"', '""')
        return f'"{doubled}"'
    return text


def _slo_class(row: Row, column: str) -> SloClass | None:
    text = row.optional(column)
    if not text:
        return None
    if text not in get_args(SloClass):
        known = ", ".join(get_args(SloClass))
        raise row.place.error(column, f"{text!r} is not one of {known}")
    return cast("SloClass", text)


def _hash_ids(row: Row) -> tuple[int, ...]:
    text = row.optional("hash_ids")
    try:
        ids = tuple(int(part) for part in text.split())
    except ValueError:
        problem = f"{text[:60]!r} is not a list of whole numbers separated by blanks"
        raise row.place.error("hash_ids", problem) from None
    return row.place.hash_ids("hash_ids", ids)
