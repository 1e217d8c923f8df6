"""What has to be fetched, gathered into wants: cells that one rank needs and the same GPUs hold.

Every sheet that a rank needs is cut at all borders of the areas that others hold of it. Within a
cell everybody holds all of it or nothing. Cells of all sheets that the same GPUs hold are one want:
for the links they are alike, and there are few hundred wants where there are many thousand cells.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from services.switcher.transfer.layout import EDGES, Layout, Part
from services.switcher.transfer.memory import Staging
from services.switcher.transfer.problem import Move
from shared.placement.copies import DISK
from shared.placement.sheets import Area, SheetName, Span

Holder = tuple[str, str]
"""GPU and the replica whose part it holds."""

ON_DISK: Holder = (DISK, "")


@dataclass(frozen=True, slots=True)
class Piece:
    """``cell_bytes``: of one unit of one layer; of the cache, for all tokens that move."""

    sheet: SheetName
    area: Area
    cell_bytes: int

    @property
    def bytes(self) -> int:
        return self.area.cells * self.cell_bytes


@dataclass(frozen=True, slots=True)
class Want:
    """``holders``: any of them can be the source of any byte; none: the disk has to be.
    ``counted`` False: a way for what may yet come, at the weight of one token. ``adopted``: in
    place under the same interval of units, so that the new rank takes over the old one's tensors
    and no link is busy."""

    gpu: str
    replica_id: str
    holders: tuple[Holder, ...]
    counted: bool = True
    adopted: bool = False
    pieces: list[Piece] = field(default_factory=list[Piece])

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    @property
    def load_bytes(self) -> int:
        """Those that any link sees."""
        return 0 if self.adopted else self.bytes


def options(want: Want) -> tuple[Holder, ...]:
    return want.holders or (ON_DISK,)


def weight_wants(layout: Layout, staging: Staging) -> list[list[Want]]:
    """By stage."""
    finder = _Finder(layout.old)
    found = [_Gathered() for _ in staging.stages]
    units = {
        (part.gpu, part.model_id, name, area.units)
        for part in layout.old
        for name, area in part.areas.items()
    }
    for part in layout.new:
        for name, area in part.areas.items():
            if name == "cache":
                continue
            sheet = layout.sheets[part.model_id][name]
            same = (part.gpu, part.model_id, name, area.units) in units
            for stage, piece in _by_stage(name, area, staging):
                for cell, holders in finder.cells(part.model_id, name, piece):
                    found[stage].add(part, holders, Piece(name, cell, sheet.cell_bytes), same=same)
    return [gathered.wants() for gathered in found]


def cache_wants(layout: Layout, move: Move) -> list[Want]:
    """Of one move; a way is planned for requests that have no tokens yet, too."""
    finder = _Finder([part for part in layout.old if part.replica_id == move.source])
    gathered = _Gathered(counted=move.tokens > 0)
    for part in (*layout.new, *layout.old):
        if part.replica_id != move.target:
            continue
        cell_bytes = layout.sheets[part.model_id]["cache"].cell_bytes * max(1, move.tokens)
        for cell, holders in finder.cells(part.model_id, "cache", part.areas["cache"]):
            gathered.add(part, holders, Piece("cache", cell, cell_bytes))
    return gathered.wants()


class _Gathered:
    def __init__(self, *, counted: bool = True) -> None:
        self._counted = counted
        self._wants: dict[tuple[str, str, tuple[Holder, ...], bool], Want] = {}

    def add(
        self, part: Part, holders: tuple[Holder, ...], piece: Piece, *, same: bool = False
    ) -> None:
        """What the GPU holds itself comes from nowhere else. ``same``: if it holds it, then with
        the same units."""
        own = tuple(holder for holder in holders if holder[0] == part.gpu)[:1]
        key = (part.gpu, part.replica_id, own or holders, bool(own) and same)
        if key not in self._wants:
            self._wants[key] = Want(*key[:3], counted=self._counted, adopted=key[3])
        self._wants[key].pieces.append(piece)

    def wants(self) -> list[Want]:
        return [self._wants[key] for key in sorted(self._wants)]


class _Finder:
    """Cuts areas into cells with their holders. Ranks of alike replicas ask for the same areas."""

    def __init__(self, old: Sequence[Part]) -> None:
        self._held: defaultdict[tuple[str, SheetName], list[tuple[Area, Holder]]]
        self._held = defaultdict(list)
        self._known: dict[tuple[str, SheetName, Area], list[tuple[Area, tuple[Holder, ...]]]] = {}
        for part in old:
            for name, area in part.areas.items():
                self._held[part.model_id, name].append((area, (part.gpu, part.replica_id)))

    def cells(
        self, model_id: str, name: SheetName, area: Area
    ) -> list[tuple[Area, tuple[Holder, ...]]]:
        key = (model_id, name, area)
        if key not in self._known:
            self._known[key] = _cut(area, self._held[model_id, name])
        return self._known[key]


def _cut(area: Area, held: Iterable[tuple[Area, Holder]]) -> list[tuple[Area, tuple[Holder, ...]]]:
    by_meet: defaultdict[Area, list[Holder]] = defaultdict(list)
    for other, holder in held:
        meet = area.meet(other)
        if meet is not None:
            by_meet[meet].append(holder)
    layers = _borders(area.layers, [meet.layers for meet in by_meet])
    units = _borders(area.units, [meet.units for meet in by_meet])
    found: list[tuple[Area, tuple[Holder, ...]]] = []
    for layer_span in layers:
        there = [(m, h) for m, h in by_meet.items() if _within(layer_span, m.layers)]
        for unit_span in units:
            holders = [h for m, hs in there if _within(unit_span, m.units) for h in hs]
            found.append((Area(layer_span, unit_span), tuple(sorted(holders))))
    return found


def _borders(span: Span, others: Iterable[Span]) -> list[Span]:
    at = sorted({*span, *(edge for other in others for edge in other)})
    return list(pairwise(at))


def _within(inner: Span, outer: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _by_stage(name: SheetName, area: Area, staging: Staging) -> list[tuple[int, Area]]:
    if name in EDGES:
        return [(staging.edges, area)]
    if len(staging.stages) == 1:
        return [(0, area)]
    parts = ((k, area.meet(Area(span, area.units))) for k, span in enumerate(staging.stages))
    return [(k, part) for k, part in parts if part is not None]
