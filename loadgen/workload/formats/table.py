"""Rows of a CSV trace under its header."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from loadgen.workload.lines import split_row
from loadgen.workload.records import Place


class Row:
    """One line's cells, found by column name; a missing cell is an error that names it."""

    __slots__ = ("_cells", "_columns", "place")

    def __init__(self, place: Place, columns: dict[str, int], cells: list[str]) -> None:
        self.place, self._columns, self._cells = place, columns, cells

    def text(self, column: str) -> str:
        return self._cells[self._columns[column]]

    def optional(self, column: str) -> str:
        """The cell, or nothing when the file has no such column."""
        at = self._columns.get(column)
        return "" if at is None else self._cells[at]

    def tokens(self, column: str) -> int:
        return self.place.tokens(column, self.text(column))

    def seconds(self, column: str) -> float:
        return self.place.seconds(column, self.text(column))


def read_rows(path: Path, header: Sequence[str], lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """The rows that follow ``header``; each must have as many cells as the header has names."""
    columns = {name: at for at, name in reversed(list(enumerate(header)))}
    for line, text in lines:
        cells = split_row(text)
        place = Place(path, line)
        if len(cells) != len(header):
            raise place.error(
                None, f"{len(cells)} cells where the header names {len(header)} columns"
            )
        yield Row(place, columns, cells)
