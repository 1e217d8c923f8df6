"""How the tables of a plan look: a title, no outer lines, and no column that says nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.planning.words import NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """``wide``: its text is folded where room is short, else it stays on one line."""

    name: str
    right: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    cells: tuple[str, ...]
    style: str = ""


def left(*names: str) -> tuple[Column, ...]:
    """Columns of short words."""
    return tuple(Column(name=name) for name in names)


def wide(*names: str) -> tuple[Column, ...]:
    """Columns of long words."""
    return tuple(Column(name=name, wide=True) for name in names)


def right(*names: str) -> tuple[Column, ...]:
    """Columns of figures."""
    return tuple(Column(name=name, right=True) for name in names)


def section(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> list[RenderableType]:
    """A blank line, the title, the table; columns without a figure in any row are left out."""
    shown = [i for i, _ in enumerate(columns) if any(row.cells[i] != NOTHING for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i in shown:
        column = columns[i]
        table.add_column(
            Text(column.name),
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not (column.wide or column.right),
            ratio=None,
        )
    for row in rows:
        table.add_row(*(Text(row.cells[i]) for i in shown), style=row.style)
    return ["", Text(title, style="bold"), table]
