"""In which order to fetch and free layers where old and new do not fit side by side.

A stage fetches a span of layers on all GPUs, then frees the old ones' weights of it. Whether the
next span fits depends on the order: tensor-parallel ranks that become pipeline stages on the same
GPUs have to go forward in every new stage alternately. So a beam search goes from stage to stage,
and keeps of the states reached those with most layers done, and those whose fullest GPU has most
left.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.switcher.transfer.problem import EMPTY
from shared.placement.sheets import Span

Bytes = NDArray[np.int64]

BEAM = 5
"""States kept of each of the two kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Of each GPU with a budget, in bytes. ``fixed``: what stays until the end, the new rank's KV
    cache apart. ``edges``: of the new rank, what belongs to no layer. ``old``, ``new``: by layer.
    """

    gpus: tuple[str, ...]
    budget: Bytes  # [gpus]
    fixed: Bytes  # [gpus]
    edges: Bytes  # [gpus]
    old: Bytes  # [gpus, layers]
    new: Bytes  # [gpus, layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """``edges``: the stage that fetches them. ``slack``: what was left of each GPU at its worst."""

    spans: tuple[Span, ...]
    edges: int
    slack: Bytes  # [gpus]


@dataclass(frozen=True, slots=True)
class _State:
    """Behind the last of ``spans``; ``left`` are runs of layers not fetched yet."""

    spans: tuple[Span, ...]
    left: tuple[Span, ...]
    free: Bytes
    slack: Bytes

    @property
    def layers_left(self) -> int:
        return sum(stop - start for start, stop in self.left)


def stages_of(ledger: Ledger, cache: Bytes) -> Stages | None:
    """The fewest stages found, with ``cache`` bytes for the new KV cache of each GPU; None if
    nothing that was tried fits."""
    old, new = ledger.old.sum(axis=1), ledger.new.sum(axis=1)
    free = ledger.budget - ledger.fixed - cache - old
    slack = free - ledger.edges - new
    if not len(ledger.gpus) or slack.min() >= 0:
        return Stages(spans=(EMPTY,), edges=0, slack=slack)
    if free.min() < 0 or (slack + old).min() < 0:
        return None  # nothing to begin with, or not even when all of the old is freed
    search = _Search(ledger)
    beam = [_State((), ((0, ledger.old.shape[1]),), free, free)]
    while beam:
        reached: dict[tuple[Span, ...], _State] = {}
        for state in beam:
            search.step(state, reached)
        if () in reached:
            found = search.ended(reached.pop(()))
            if found is not None:
                return found
        states = sorted(reached.values(), key=lambda s: (s.layers_left, -int(s.free.min())))
        roomy = sorted(states[BEAM:], key=lambda s: -int(s.free.min()))
        beam = states[:BEAM] + roomy[:BEAM]
    return None


class _Search:
    def __init__(self, ledger: Ledger) -> None:
        self._edges = ledger.edges
        self._old = _sums(ledger.old)
        self._new = _sums(ledger.new)
        held = np.concatenate((ledger.old, ledger.new))
        changes = np.any(held[:, 1:] != held[:, :-1], axis=0)
        self._borders: list[int] = (np.flatnonzero(changes) + 1).tolist()

    def step(self, state: _State, reached: dict[tuple[Span, ...], _State]) -> None:
        """Enters what is reached by every span worth a try: begun where a run or a rank begins and
        as long as fits, until a rank ends, or one layer long; or the other way round."""
        for run in state.left:
            inner = [border for border in self._borders if run[0] < border < run[1]]
            edges = [run[0], *inner, run[1]]
            spans: set[Span] = set()
            for edge in edges:
                stop = self._longest(state.free, edge, run[1])
                start = self._longest(state.free, edge, run[0])
                spans |= {(edge, stop), (start, edge)}
                spans |= {(edge, min(stop, edge + 1)), (max(start, edge - 1), edge)}
                spans |= {(edge, other) for other in edges if edge < other < stop}
            for span in sorted(spans):
                left = tuple(rest for one in state.left for rest in _without(one, span))
                if span[0] < span[1] and left not in reached:
                    fetched = state.free - (self._new[:, span[1]] - self._new[:, span[0]])
                    reached[left] = _State(
                        (*state.spans, span),
                        left,
                        fetched + self._freed(span),
                        np.minimum(state.slack, fetched),
                    )

    def ended(self, state: _State) -> Stages | None:
        """The edges come first if there is room all the time, else with the last stage, else in
        one of their own behind it."""
        spans, slack = state.spans, state.slack - self._edges
        if slack.min() >= 0:
            return Stages(spans=spans, edges=0, slack=slack)
        slack = np.minimum(state.slack, state.free - self._freed(spans[-1]) - self._edges)
        if slack.min() < 0:
            spans = (*spans, EMPTY)
            slack = np.minimum(state.slack, state.free - self._edges)
        return Stages(spans=spans, edges=len(spans) - 1, slack=slack) if slack.min() >= 0 else None

    def _freed(self, span: Span) -> Bytes:
        return self._old[:, span[1]] - self._old[:, span[0]]

    def _longest(self, free: Bytes, edge: int, limit: int) -> int:
        """How far from ``edge`` towards ``limit`` layers can be fetched."""
        low, high = min(edge, limit), max(edge, limit)
        needed = np.abs(self._new[:, low : high + 1] - self._new[:, edge : edge + 1])
        count = int(np.all(needed <= free[:, None], axis=0).sum()) - 1
        return edge + count if limit >= edge else edge - count


def _sums(layers: Bytes) -> Bytes:
    """Of all layers before each, and of all: [gpus, layers + 1]."""
    return np.concatenate((np.zeros((len(layers), 1), dtype=np.int64), layers.cumsum(axis=1)), 1)


def _without(run: Span, span: Span) -> list[Span]:
    if span[1] <= run[0] or run[1] <= span[0]:
        return [run]
    rest = ((run[0], span[0]), (span[1], run[1]))
    return [part for part in rest if part[0] < part[1]]
