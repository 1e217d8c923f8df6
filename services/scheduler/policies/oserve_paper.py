"""OServe's upper level: search deployments, guided by the flow (arXiv 2602.12151).

What third parties' reading notes of the paper report, and this follows:

- Start from a deployment, solve the flow, call replicas bottlenecks that it saturates and redundant
  that it leaves slack; move GPUs from redundant to bottleneck replicas; also split, merge and swap.
- For each replica changed, try every (TP, PP) of its new size; keep the change if the flow grows.
- Stop after 20 iterations in a row that brought nothing.
- One-minute periods; only shares change where the deployment stays; switch whenever it differs.

What they leave open, and is inferred here:

- The start is the plan in force, or as many of each model's smallest replicas as fit.
- An iteration tries every move around the most loaded, the least loaded and one more replica, drawn
  at random (seeded by the problem), and makes the best. What a move leaves over becomes replicas
  again, the largest first.
- Flow alone cannot rank deployments that serve all demand; among equals, headroom decides.
- The lower level is solved as the linear program that the flow network stands for: what it finds is
  at least what preflow-push does ("lp"; "preflow" takes ``flow_preflow`` instead, for comparison).
- Several models and kinds of GPU (the paper has one of each at a time): GPUs move between models
  on the same pool, and no model loses its last replica.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, product
from typing import Literal

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Flow, best_flow
from services.scheduler.policies.flow_preflow import preflow_push
from services.scheduler.policies.joint import plannable, verify

PATIENCE = 20
ITERATIONS_MAX = 500
STRATEGIES_MAX = 64  # combinations of (TP, PP) tried for one change
BETTER = 1e-6  # relative: less is rounding

Lower = Literal["lp", "preflow"]
State = tuple[Column, ...]
"""Replicas, sorted: GPUs are alike, so that only the multiset matters."""

Slot = tuple[str, str, int]
"""Model, pool and GPUs of a replica whose (TP, PP) is still open."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Found:
    """``flow`` serves what is expected; ``even`` is the flow at the greatest headroom."""

    counts: Counter[Column]
    flow: Flow
    even: Flow
    iterations: int
    deployments: int  # whose flow was solved


@dataclass(frozen=True, slots=True)
class _Change:
    """Replicas (by place in the state) that go, and slots that come."""

    removed: tuple[int, ...]
    slots: tuple[Slot, ...]


def search(
    table: Table, start: Counter[Column], models: Sequence[str], *, lower: Lower = "lp"
) -> Found:
    """The best deployment found from ``start``, which may be empty. Same arguments, same answer."""
    return _Search(table, models, lower).run(start)


class _Search:
    def __init__(self, table: Table, models: Sequence[str], lower: Lower) -> None:
        self._table, self._lower = table, lower
        fitting = {column.model_id for column in table.columns if plannable(column)}
        self._models = [model_id for model_id in models if model_id in fitting]
        self._known: dict[State, tuple[Flow, Flow]] = {}
        self._strategies: dict[Slot, list[Column]] = {}
        for column in table.columns:
            if plannable(column):
                slot = (column.model_id, column.pool, column.shape.gpus)
                self._strategies.setdefault(slot, []).append(column)

    def run(self, start: Counter[Column]) -> Found:
        state = tuple(sorted(start.elements()))
        if not state or self._wrong(state):
            state = self._default()
        random = np.random.default_rng(self._seed(state))
        iterations = barren = 0
        while barren < PATIENCE and iterations < ITERATIONS_MAX:
            iterations += 1
            better = state
            for change in self._moves(state, random):
                better = self._best_of(state, change, better)
            barren = 0 if better != state else barren + 1
            state = better
        flow, even = self._flows(state)
        return Found(
            counts=Counter(state),
            flow=flow,
            even=even,
            iterations=iterations,
            deployments=len(self._known),
        )

    def _seed(self, state: State) -> int:
        """Of the problem, so that the same one is searched the same way."""
        text = repr((state, self._table.types, self._table.columns))
        return int.from_bytes(sha256(text.encode()).digest()[:8], "big")

    def _wrong(self, state: State) -> bool:
        return bool(verify(self._table, Counter(state), wanted=self._models))

    def _default(self) -> State:
        """The smallest replicas of each model in turn, until nothing more fits."""
        state: State = ()
        open_ = list(self._models)
        while open_:
            for model_id in tuple(open_):
                options = sorted(
                    (column for column in self._table.columns if column.model_id == model_id),
                    key=lambda column: (column.shape.gpus, column.shape.pp, column),
                )
                grown = (
                    (*state, column)
                    for column in options
                    if plannable(column)
                    and not verify(self._table, Counter((*state, column)), wanted=())
                )
                found = next(grown, None)
                state = tuple(sorted(found)) if found else state
                if found is None:
                    open_.remove(model_id)
        return state

    def _flows(self, state: State) -> tuple[Flow, Flow]:
        known = self._known.get(state)
        if known is None:
            instance = self._table.instance(Counter(state))
            even = best_flow(instance, "headroom")
            if self._lower == "preflow":
                flow = preflow_push(instance)
            else:
                flow = best_flow(instance, "served")
            assert even is not None, "no flow at all is a flow"
            assert flow is not None, "no flow at all is a flow"
            known = self._known[state] = (flow, even)
        return known

    def _value(self, state: State) -> tuple[float, float]:
        flow, even = self._flows(state)
        return flow.served, even.headroom

    def _best_of(self, state: State, change: _Change, best: State) -> State:
        """``state`` after ``change``, at the best (TP, PP) of each slot; ``best`` if no better."""
        kept = [column for i, column in enumerate(state) if i not in change.removed]
        options = [self._strategies[slot] for slot in change.slots]
        for columns in islice(product(*options), STRATEGIES_MAX):
            attempt = tuple(sorted((*kept, *columns)))
            if self._wrong(attempt):
                continue
            if _better(self._value(attempt), self._value(best)):
                best = attempt
        return best

    def _moves(self, state: State, random: np.random.Generator) -> Iterator[_Change]:
        """Changes around the most and the least loaded replica, and one drawn at random."""
        if not state:
            return
        index = {column: s for s, column in enumerate(self._table.columns)}
        loads = self._flows(state)[0].loads
        ranked = sorted(range(len(state)), key=lambda i: (float(loads[index[state[i]]]), i))
        idle, busy = ranked[0], ranked[-1]
        drawn = int(random.integers(len(state)))
        yield from self._transfers(state, idle, busy)
        yield from self._transfers(state, drawn, busy)
        for i in dict.fromkeys((busy, drawn)):
            column = state[i]
            slot = (column.model_id, column.pool, column.shape.gpus)
            if slot in self._strategies:
                yield _Change((i,), (slot,))  # another (TP, PP) of the same size
            half = (column.model_id, column.pool, column.shape.gpus // 2)
            if half in self._strategies:
                yield _Change((i,), (half, half))  # split
        for i in dict.fromkeys((idle, drawn)):
            yield from self._merges(state, i)
        yield from self._swaps(state, busy, drawn)
        yield from self._growths(state, busy)

    def _transfers(self, state: State, giver: int, taker: int) -> Iterator[_Change]:
        give, take = state[giver], state[taker]
        if giver == taker or give.pool != take.pool:
            return
        for gpus in (1, 2, 4):
            larger = (take.model_id, take.pool, take.shape.gpus + gpus)
            if larger in self._strategies and give.shape.gpus >= gpus:
                rest = self._pieces(give, give.shape.gpus - gpus)
                yield _Change((giver, taker), (larger, *rest))
        same = (take.model_id, take.pool, take.shape.gpus)
        if give.shape.gpus >= take.shape.gpus and same in self._strategies:
            rest = self._pieces(give, give.shape.gpus - take.shape.gpus)
            yield _Change((giver,), (same, *rest))  # the taker gets a twin instead of more GPUs

    def _merges(self, state: State, i: int) -> Iterator[_Change]:
        for k, other in enumerate(state):
            column = state[i]
            if k == i or (other.model_id, other.pool) != (column.model_id, column.pool):
                continue
            whole = (column.model_id, column.pool, column.shape.gpus + other.shape.gpus)
            if whole in self._strategies:
                yield _Change((i, k), (whole,))
                return

    def _swaps(self, state: State, i: int, k: int) -> Iterator[_Change]:
        """Two models, or pools, exchange the sizes of their replicas."""
        one, two = state[i], state[k]
        first = (one.model_id, one.pool, two.shape.gpus)
        second = (two.model_id, two.pool, one.shape.gpus)
        unlike = first[:2] != second[:2] and one.shape.gpus != two.shape.gpus
        if unlike and first in self._strategies and second in self._strategies:
            yield _Change((i, k), (first, second))

    def _growths(self, state: State, i: int) -> Iterator[_Change]:
        """GPUs that no replica has: another replica of the model, or a larger one."""
        for pool in self._table.pools.values():
            used = sum(column.shape.gpus for column in state if column.pool == pool.name)
            left = sum(pool.node_gpus) - used
            for size in sorted({gpus for _, name, gpus in self._strategies if name == pool.name}):
                slot = (state[i].model_id, pool.name, size)
                if slot not in self._strategies:
                    continue
                if size <= left:
                    yield _Change((), (slot,))
                if state[i].pool == pool.name and 0 < size - state[i].shape.gpus <= left:
                    yield _Change((i,), (slot,))

    def _pieces(self, column: Column, gpus: int) -> tuple[Slot, ...]:
        """``gpus`` as replicas of the column's model, the largest first; the rest stays idle."""
        sizes = sorted(
            {
                size
                for model_id, pool, size in self._strategies
                if (model_id, pool) == (column.model_id, column.pool)
            },
            reverse=True,
        )
        pieces: list[Slot] = []
        for size in sizes:
            while gpus >= size:
                pieces.append((column.model_id, column.pool, size))
                gpus -= size
        return tuple(pieces)


def _better(new: tuple[float, float], old: tuple[float, float]) -> bool:
    """More served; or as much, with more headroom."""
    if new[0] > old[0] * (1 + BETTER):
        return True
    return new[0] >= old[0] * (1 - BETTER) and new[1] > old[1] * (1 + BETTER)
