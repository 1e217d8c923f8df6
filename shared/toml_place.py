"""Where in a settings file a field stands, for errors that name file, line and field."""

import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigInvalid

_HEADER = re.compile(r'^\s*(\[\[?)\s*([\w.\-"*]+)\s*\]\]?')
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@contextmanager
def located(file: Path, *, sections: Collection[str], but: Collection[str] = ()) -> Generator[None]:
    """Errors about fields of ``sections`` say where ``file`` has them, if it does. Fields in
    ``but``, with all that is inside them, were set elsewhere."""
    try:
        yield
    except ConfigInvalid as error:
        section = error.field.partition(".")[0].partition("[")[0]
        elsewhere = any(error.field == path or error.field.startswith(path + ".") for path in but)
        if section in sections and not elsewhere:
            place = f"{file}, line {line}" if (line := line_of(file, error.field)) else str(file)
            error.args = (f"{place}: {error.args[0]}",)
        raise


def line_of(file: Path, field: str) -> int:
    """The line of ``field`` (``mesh.nodes[1].gpus``, ``mesh.nodes.n1.gpus``), of the table that it
    should stand in if it is absent, or 0. A table of an array goes by its number or an id in it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    steps = [name or int(number) for name, number in _STEP.findall(field)]
    tables = list(_tables(lines))
    before = tables[0].first - 1 if tables else len(lines)
    deepest, found, left = 0, _Table("", 0, 0, before, is_array=False), steps[:1]
    for table in tables:
        rest = _inside(table, steps, lines)
        if rest is not None and len(steps) - len(rest) > deepest:
            deepest, found, left = len(steps) - len(rest), table, rest
    for key in [step for step in left if isinstance(step, str)]:
        for number, line in enumerate(lines[found.first : found.last], found.first + 1):
            if re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line):
                return number
    return found.first


@dataclass(frozen=True, slots=True)
class _Table:
    """``number`` counts those of the same name; its lines are ``first`` (its header, from 1) to
    ``last``."""

    name: str
    number: int
    first: int
    last: int
    is_array: bool


def _tables(lines: list[str]) -> Generator[_Table]:
    headers = [(i, match) for i, line in enumerate(lines, 1) if (match := _HEADER.match(line))]
    ends = [start - 1 for start, _ in headers] + [len(lines)]
    counts: dict[str, int] = {}
    for (first, match), last in zip(headers, ends[1:], strict=True):
        name = match[2].replace('"', "")
        yield _Table(name, counts.get(name, 0), first, last, is_array=match[1] == "[[")
        counts[name] = counts.get(name, 0) + 1


def _inside(table: _Table, steps: list[str | int], lines: list[str]) -> list[str | int] | None:
    """What is left of the path inside the table; None if it leads elsewhere."""
    parts = table.name.split(".")
    if parts[: len(steps)] == steps:
        return []  # a table within what is looked for says where that is
    if steps[: len(parts)] != parts:
        return None
    rest = steps[len(parts) :]
    if not table.is_array or not rest:
        return rest
    if isinstance(rest[0], int):
        return rest[1:] if rest[0] == table.number else None
    own = re.compile(rf"=\s*\"{re.escape(rest[0])}\"")
    return rest[1:] if any(own.search(line) for line in lines[table.first : table.last]) else rest
