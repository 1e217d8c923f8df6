"""From shares of bytes to copies of areas: wants are cut along layers and units, and joined."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from services.switcher.transfer.wants import Holder, Piece, Want
from shared.placement.copies import Copy
from shared.placement.sheets import Area, SheetName, Span

NEAR = 2e-4
"""Of a want's bytes: as far as a cut may be from its share to be a straight one."""

Cut = tuple[Holder, Piece]


def cut(want: Want, shares: Mapping[Holder, float]) -> list[Cut]:
    """Pieces of the want for each holder, as near to its share as whole cells allow. Pieces with
    small cells come last, so that they make up for what the others leave uneven."""
    order = sorted(shares, key=lambda holder: (-shares[holder], holder))
    if len(order) == 1:
        return [(order[0], piece) for piece in want.pieces]
    total = want.bytes
    rest = sorted(want.pieces, key=lambda p: (-p.cell_bytes, p.sheet, p.area.layers, p.area.units))
    found: list[Cut] = []
    due = 0.0
    given = 0
    for holder in order[:-1]:
        due += shares[holder] * total
        while rest:
            piece = rest.pop(0)
            taken, others = _split(piece, due - given, NEAR * total)
            if taken is None:
                rest[:0] = others
                break
            given += sum(part.bytes for part in taken)
            found += ((holder, part) for part in taken)
            if others:
                rest[:0] = others
                break
    found += ((order[-1], piece) for piece in rest)
    return found


def _split(piece: Piece, byte_count: float, near: float) -> tuple[list[Piece] | None, list[Piece]]:
    """``byte_count`` of the piece, and what remains: by whole layers or whole units where that is
    near enough, else by layers and units of one layer. None where not a cell is to be had."""
    if byte_count >= piece.bytes - piece.cell_bytes / 2:
        return [piece], []
    (top, bottom), (first, last) = piece.area.layers, piece.area.units
    layers, units = bottom - top, last - first
    cells = round(byte_count / piece.cell_bytes)
    if cells <= 0:
        return None, [piece]
    rows, columns = round(cells / units), round(cells / layers)
    tolerance = near / piece.cell_bytes
    if 0 < rows < layers and abs(rows * units - cells) <= tolerance:
        areas = [Area((top, top + rows), (first, last))]
        others = [Area((top + rows, bottom), (first, last))]
    elif 0 < columns < units and abs(columns * layers - cells) <= tolerance:
        areas = [Area((top, bottom), (first, first + columns))]
        others = [Area((top, bottom), (first + columns, last))]
    else:
        rows, columns = divmod(cells, units)
        middle = (top + rows, min(bottom, top + rows + 1))
        areas = [
            Area((top, top + rows), (first, last)),
            Area(middle, (first, first + columns)),
        ]
        others = [
            Area(middle, (first + columns, last)),
            Area((middle[1], bottom), (first, last)),
        ]
    return _pieces(piece, areas), _pieces(piece, others)


def _pieces(piece: Piece, areas: Iterable[Area]) -> list[Piece]:
    return [Piece(piece.sheet, area, piece.cell_bytes) for area in areas if area.cells > 0]


def joined(cuts: Sequence[Cut], stage: int) -> list[Copy]:
    """One rank's copies of one stage: areas from one source that make a rectangle are one copy."""
    areas: defaultdict[tuple[SheetName, Holder], list[Area]] = defaultdict(list)
    for holder, piece in cuts:
        areas[piece.sheet, holder].append(piece.area)
    return [
        Copy(sheet=sheet, area=area, source=holder[0], replica_id=holder[1], stage=stage)
        for (sheet, holder), parts in sorted(areas.items())
        for area in _rectangles(parts)
    ]


def _rectangles(areas: list[Area]) -> list[Area]:
    """Fewer areas, the same cells: neighbours are joined until there are none."""
    while True:
        fewer = _in_line([(area.units, area.layers) for area in areas])
        wide = _in_line([(layers, units) for units, layers in fewer])
        if len(wide) == len(areas):
            return [Area(layers, units) for layers, units in wide]
        areas = [Area(layers, units) for layers, units in wide]


def _in_line(spans: list[tuple[Span, Span]]) -> list[tuple[Span, Span]]:
    """Joins (across, along) where ``across`` is the same and one ``along`` ends where the next
    begins."""
    found: list[tuple[Span, Span]] = []
    for across, along in sorted(spans):
        if found and found[-1][0] == across and found[-1][1][1] == along[0]:
            found[-1] = (across, (found[-1][1][0], along[1]))
        else:
            found.append((across, along))
    return found
