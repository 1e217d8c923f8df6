"""Online k-means on two log lengths, with numbers that stay.

J. MacQueen, "Some methods for classification and analysis of multivariate observations" (1967):
each sample moves its nearest centre by 1/n of the way, n being the samples behind that centre. Two
parameters of the same paper let the number of centres follow the data: R (``refine_ln``), beyond
which a sample starts a centre of its own, and C (``coarsen_ln``), below which two centres may
become one. We differ in three points. The rate has a floor (``memory``), so that centres follow
traffic that drifts, as per-centre counts do in D. Sculley, "Web-scale k-means clustering" (2010).
A centre starts only after several far samples, so that one odd request is not a type; the first
ones move nothing, lest a centre be drawn into the gap. And centres merge only when a far sample
needs their number, so that numbers otherwise stay what they are.

The first centres are chosen from a sample as in k-means++ (D. Arthur and S. Vassilvitskii, 2007),
but greedily: where that draws the next centre at random by squared distance, we take the one that
leaves the smallest sum of squared distances. It needs no randomness and ignores lone outliers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

LLOYD_ROUNDS_MAX = 10
Point = tuple[float, float]


@dataclass(slots=True)
class Centre:
    x: float
    y: float
    weight: float
    idle_windows: int = 0

    def distance2(self, point: Point) -> float:
        return (self.x - point[0]) ** 2 + (self.y - point[1]) ** 2

    def move(self, point: Point, *, memory: float) -> None:
        self.weight = min(self.weight + 1.0, memory)
        self.x += (point[0] - self.x) / self.weight
        self.y += (point[1] - self.y) / self.weight


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a sample went. When two types had to become one to make room for it, the type that
    was ``number`` is now part of ``merged_into``, and ``number`` is a new type."""

    number: int
    merged_into: int | None = None


@dataclass(slots=True, kw_only=True)
class OnlineKMeans:
    """At most ``size`` centres; a number without a centre is None."""

    size: int
    memory: float
    refine_ln: float
    refine_samples: int
    coarsen_ln: float
    centres: list[Centre | None] = field(default_factory=list["Centre | None"])
    far_samples: int = 0

    def __post_init__(self) -> None:
        self.centres = (self.centres + [None] * self.size)[: self.size]

    @property
    def seeded(self) -> bool:
        return any(centre is not None for centre in self.centres)

    def live(self) -> list[tuple[int, Centre]]:
        return [(number, c) for number, c in enumerate(self.centres) if c is not None]

    def seed(self, points: Sequence[Point]) -> None:
        """Make the first centres; number 0 is the one with the shortest requests."""
        chosen = lloyd(points, greedy_centres(points, self.size))
        chosen.sort(key=lambda c: (c.x + c.y, c.x))
        self.centres = [*chosen, *[None] * (self.size - len(chosen))]

    def nearest(self, point: Point) -> tuple[int, float]:
        """Number of the nearest centre and the squared distance to it; there must be one."""
        best, best_d2 = -1, float("inf")
        for number, centre in enumerate(self.centres):
            if centre is not None:
                d2 = centre.distance2(point)
                if d2 < best_d2:
                    best, best_d2 = number, d2
        assert best >= 0, "nearest needs a centre"
        return best, best_d2

    def nearest_by_input(self, input_ln: float) -> int:
        """For a request that did not end: its output length says nothing."""
        return min(self.live(), key=lambda item: abs(item[1].x - input_ln))[0]

    def add(self, point: Point) -> Placed:
        """Take one sample and learn from it."""
        number, d2 = self.nearest(point)
        centre = self.centres[number]
        assert centre is not None
        centre.idle_windows = 0
        if d2 > self.refine_ln**2:
            self.far_samples += 1
            if self.far_samples < self.refine_samples:
                return Placed(number)
            placed = self._refine(point)
            if placed is not None:
                return placed
        centre.move(point, memory=self.memory)
        return Placed(number)

    def end_window(self, *, idle_windows_max: int) -> list[int]:
        """Age the centres; those unseen for too long give their number back, one always stays."""
        self.far_samples = 0
        for _, centre in self.live():
            centre.idle_windows += 1
        retired = [n for n, c in self.live() if c.idle_windows > idle_windows_max]
        if len(retired) == len(self.live()):
            return []  # no traffic at all says nothing about the types
        for number in retired:
            self.centres[number] = None
        return retired

    def _refine(self, point: Point) -> Placed | None:
        """Start a centre at ``point``: on a free number, else on one that a merger frees."""
        merged_into: int | None = None
        if None in self.centres:
            number = self.centres.index(None)
        else:
            pair = self._closest_pair()
            if pair is None:
                return None
            merged_into, number = pair
            self._merge(merged_into, number)
        self.centres[number] = Centre(point[0], point[1], 1.0)
        self.far_samples = 0
        return Placed(number, merged_into)

    def _closest_pair(self) -> tuple[int, int] | None:
        """The two nearest centres, if nearer than ``coarsen_ln``; the lower number first."""
        live = self.live()
        pairs = [(a.distance2((b.x, b.y)), i, j) for i, a in live for j, b in live if i < j]
        if not pairs or min(pairs)[0] >= self.coarsen_ln**2:
            return None
        _, first, second = min(pairs)
        return first, second

    def _merge(self, first: int, second: int) -> None:
        a, b = self.centres[first], self.centres[second]
        assert a is not None
        assert b is not None
        weight = a.weight + b.weight
        a.x = (a.x * a.weight + b.x * b.weight) / weight
        a.y = (a.y * a.weight + b.y * b.weight) / weight
        a.weight = min(weight, self.memory)
        a.idle_windows = min(a.idle_windows, b.idle_windows)


def greedy_centres(points: Sequence[Point], size: int) -> list[Centre]:
    """Up to ``size`` of the points, fewer if fewer differ; O(size * n^2)."""
    candidates = sorted(set(points))
    nearest2 = [float("inf")] * len(points)
    chosen: list[Centre] = []
    while candidates and len(chosen) < size and (not chosen or max(nearest2) > 0.0):
        best = min(candidates, key=lambda c: _left(points, nearest2, c))
        candidates.remove(best)
        nearest2 = [min(d, _distance2(p, best)) for p, d in zip(points, nearest2, strict=True)]
        chosen.append(Centre(best[0], best[1], 0.0))
    return chosen


def lloyd(points: Sequence[Point], centres: list[Centre]) -> list[Centre]:
    """A few of Lloyd's rounds: assign each point, move each centre to its points' mean."""
    for _ in range(LLOYD_ROUNDS_MAX):
        groups: list[list[Point]] = [[] for _ in centres]
        for point in points:
            distances = [centre.distance2(point) for centre in centres]
            groups[distances.index(min(distances))].append(point)
        moved = [
            Centre(
                sum(p[0] for p in group) / len(group),
                sum(p[1] for p in group) / len(group),
                float(len(group)),
            )
            for group in groups
            if group
        ]
        if [(c.x, c.y) for c in moved] == [(c.x, c.y) for c in centres]:
            return moved
        centres = moved
    return centres


def _left(points: Sequence[Point], nearest2: list[float], candidate: Point) -> float:
    return sum(min(d, _distance2(p, candidate)) for p, d in zip(points, nearest2, strict=True))


def _distance2(a: Point, b: Point) -> float:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
