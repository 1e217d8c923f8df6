"""Which of the near-optimal plans to take: first by formulas, the best few by a rehearsal.

    best, terms = solve_capacity(table, models, needs=..., time_limit_s=...)    how much fits at all
    found = candidates(judge, best, terms, time_limit_s=...)     plans worth comparing, with shares
    choose(found)                                                the best of them by formulas
    rehearsal_choice.rehearsed(judge, found, ...)                the best of them, played through

Fluid capacity says how much a plan could carry, not how fast it answers what does arrive. Under
light load many plans carry it: sixteen small replicas carry most, two large ones answer soonest.
So plans are compared by *lateness*

    sum_j w[j] * E[ max(ttft99 / ttft_target, tpot99 / tpot_target) ]

with w[j] the share of type j among the requests, the expectation over the replicas it is sent to,
the targets those of its type, and the tails from ``joint_latency``: below 1 the predicted 99th
percentiles meet their targets. Overload shows in it as waiting, so one number compares plans at any
load.

Candidates are few, and come from programs in ``joint``:

- the plan of greatest headroom t*;
- for loads u from 1 / t* (all of that capacity needed) to ``LOAD_MAX``: the plan that minimises the
  lateness of types on shapes, were every replica loaded u with each type alone (which makes it
  linear: "gentle"), then filled up with what carries most on the GPUs that this leaves;
- every uniform plan: all replicas of a model on a pool of one shape. Linear programs see no queues,
  and what one shape gains by sharing them may exceed what unlike shapes gain by fitting;
- where GPUs may be left unused ("elastic"), instead: the cheapest plans that carry the demand with
  no replica loaded above ``LOAD_MAX``, or above some less.

Each is dispatched by greatest headroom, by least work and, for gentle plans, as their own program
did; all are then compared under the load and the mix that their replicas would really see. Of
those within ``TIE`` of the best, the one of most headroom is taken: it uses GPUs that would idle.
Elastic, the cheapest whose tails are on time is taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from services.scheduler.policies.capacity import (
    Column,
    RateSource,
    ReplicaKind,
    Table,
    TypeDemand,
    kind_of,
)
from services.scheduler.policies.capacity_plan import spread
from services.scheduler.policies.flow import Array, best_flow
from services.scheduler.policies.interface import Needs, Problem
from services.scheduler.policies.joint import Solution, Terms, best_joint, plannable
from services.scheduler.policies.joint_latency import Load, Tail, tails
from services.scheduler.policies.joint_uniform import Counts, lean_plans, uniform_plans
from shared.cost.model import CostModel
from shared.slo import SloTarget

LOAD_MAX = 0.9  # beyond, waiting grows faster than any shape can make up for
LOADS = 4  # steps from the load at greatest headroom to ``LOAD_MAX``
TIE = 0.05  # lateness that differs less is a tie: its prediction is no better
NOTHING = 1e-9  # headroom or requests/s: a solver's zero
SLACK = 1.02  # of the first step: at exactly 1 / t* rounding may leave nothing feasible
THRIFT_LOADS = (LOAD_MAX, 0.75, 0.6, 0.45, 0.3)  # of the cheapest plans to be compared
NO_NEEDS = Needs()


class LatencySource(RateSource, Protocol):
    def model(self, kind: ReplicaKind) -> CostModel:
        """The cost model of one replica, which is known to fit."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidate:
    """``shares`` [S, J] of each type sum to 1 where any replica can serve it. ``price``: per hour,
    of its GPUs."""

    counts: Mapping[Column, int]
    shares: Array
    headroom: float
    lateness: float
    price: float = 0.0

    @property
    def gpus(self) -> int:
        return sum(column.shape.gpus * count for column, count in self.counts.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Lateness of plans for one table, over ``horizon_s``."""

    problem: Problem
    table: Table
    source: LatencySource
    horizon_s: float

    def candidate(self, counts: Mapping[Column, int], shares: Array, headroom: float) -> Candidate:
        return Candidate(
            counts=counts,
            shares=shares,
            headroom=headroom,
            lateness=self.lateness(counts, shares),
            price=self.price(counts),
        )

    def price(self, counts: Mapping[Column, int]) -> float:
        """Of the GPUs of ``counts``, per hour; 1 for each whose price nobody said."""
        prices, pools = self.problem.needs.gpu_prices, self.table.pools
        return sum(
            prices.get(pools[column.pool].kind, 1.0) * column.shape.gpus * count
            for column, count in counts.items()
        )

    def goals(self) -> list[list[tuple[float, SloTarget]]]:
        """By type, the targets of its SLO classes, with the share of its requests that has each;
        where nothing is said of classes, the target it is planned for."""
        return [self._goals(kind) for kind in self.table.types]

    def _goals(self, kind: TypeDemand) -> list[tuple[float, SloTarget]]:
        own, total = self.problem.targets[kind.model_id], sum(kind.class_shares.values())
        if total <= 0.0:
            return [(1.0, kind.target)]
        others = self.problem.class_targets
        return [
            (share / total, own if name == "standard" else others.get(name, own))
            for name, share in sorted(kind.class_shares.items())
        ]

    def dispatched(self, counts: Mapping[Column, int]) -> Candidate:
        """``counts`` with the best of their dispatches."""
        return min(self.dispatches(counts), key=lambda candidate: candidate.lateness)

    def dispatches(self, counts: Mapping[Column, int]) -> Iterator[Candidate]:
        instance = self.table.instance(counts)
        even = best_flow(instance, "headroom")
        assert even is not None, "no flow at all is a flow"
        if even.headroom > NOTHING:
            yield self.candidate(counts, spread(even.shares()), even.headroom)
            load = max(LOAD_MAX, SLACK / even.headroom)
            lean = best_flow(instance, "lean", load=load)
            if lean is not None:
                yield self.candidate(counts, spread(lean.shares()), even.headroom)
        else:  # some type finds no replica: serve what can be served
            most = best_flow(instance, "served")
            assert most is not None, "no flow at all is a flow"
            usable = self.table.rates * instance.copies[:, None]
            shares = np.where(most.sent.any(axis=0), most.shares(), spread(usable))
            yield self.candidate(counts, shares, 0.0)

    def lateness(self, counts: Mapping[Column, int], shares: Array) -> float:
        """Types without any replica wait for all of the horizon."""
        table, total = self.table, float(self.table.demand.sum())
        late = 0.0
        for s, column in enumerate(table.columns):
            count = counts.get(column, 0)
            types = [int(j) for j in np.flatnonzero(shares[s])] if count else []
            if types:
                sent = [table.types[j].arrivals_rps * float(shares[s, j]) for j in types]
                found = self._tails(column, types, [rps / count for rps in sent])
                late += sum(
                    rps * self._ratio(j, tail)
                    for j, rps, tail in zip(types, sent, found, strict=True)
                )
        for j, kind in enumerate(table.types):
            left = 1.0 - min(1.0, float(shares[:, j].sum()))
            late += left * kind.arrivals_rps * self.horizon_s / kind.target.ttft_s
        return late / total

    def late(self, counts: Mapping[Column, int]) -> float:
        """Lateness of the best dispatch of ``counts``."""
        return self.dispatched(counts).lateness

    def alone(self, load: float) -> Array:
        """[S, J]: lateness of each type on each column, loaded ``load`` with it alone; 0 for arcs
        that are none."""
        cost = np.zeros_like(self.table.rates)
        for s, j in zip(*np.nonzero(self.table.rates), strict=True):
            column, rate = self.table.columns[int(s)], float(self.table.rates[s, j])
            tail = self._tails(column, [int(j)], [load * rate])[0]
            cost[s, j] = self._ratio(int(j), tail)
        return cost

    def start_s(self, column: Column) -> float:
        """From nothing to serving."""
        return self.model(column).start_s

    def _tails(self, column: Column, types: Sequence[int], rps: Sequence[float]) -> list[Tail]:
        loads = [
            Load(
                arrivals_rps=each,
                input_tokens=self.table.types[j].input_tokens,
                output_tokens=self.table.types[j].output_tokens,
            )
            for j, each in zip(types, rps, strict=True)
        ]
        return tails(self.model(column), loads, self.problem.limits, horizon_s=self.horizon_s)

    def model(self, column: Column) -> CostModel:
        return self.source.model(kind_of(column, self.problem, self.table.pools))

    def _ratio(self, j: int, tail: Tail) -> float:
        target = self.table.types[j].target
        return max(tail.ttft_s / target.ttft_s, tail.tpot_s / target.tpot_s)


def solve_capacity(
    table: Table, models: Sequence[str], *, time_limit_s: float, needs: Needs = NO_NEEDS
) -> tuple[Solution | None, Terms]:
    """The plan of greatest headroom, or if ``needs.elastic`` and GPUs suffice, the cheapest; and
    the terms that it keeps to, for ``candidates``. They are what is needed, or where GPUs do not
    suffice, less: first no replica can be lost any more, then models get one replica, then only
    those that anything is expected of. If no plan serves some of every type, the one that serves
    most requests."""
    for survive in range(needs.survive, -1, -1):
        for least in _ladder(table, models, needs):
            terms = Terms(least=least, survive=survive, prices=needs.gpu_prices)
            found = best_joint(table, "headroom", terms, time_limit_s=time_limit_s)
            if found is None or found.objective <= NOTHING or (survive and found.objective < 1.0):
                continue
            if needs.elastic and found.objective >= 1.0 / LOAD_MAX:
                lean = replace(terms, load=LOAD_MAX)
                cheap = best_joint(table, "thrift", lean, time_limit_s=time_limit_s)
                if cheap is not None:
                    return cheap, lean
            return found, terms
    for least in [*_ladder(table, models, needs), {}]:
        terms = Terms(least=least)
        found = best_joint(table, "served", terms, time_limit_s=time_limit_s)
        if found is not None and found.objective > NOTHING:
            return found, terms
    return None, Terms()


def _ladder(table: Table, models: Sequence[str], needs: Needs) -> list[dict[str, int]]:
    """Least replicas by model, to be tried in turn. A model that fits no shape is asked for none."""
    fitting = {column.model_id for column in table.columns if plannable(column)}
    expected = {kind.model_id for kind in table.types}
    asked = {m: needs.replicas_min.get(m, 1) for m in models if m in fitting}
    rungs = [
        {model_id: count for model_id, count in asked.items() if count > 0},
        {model_id: 1 for model_id, count in asked.items() if count > 0},
        {model_id: 1 for model_id in asked if model_id in expected},
    ]
    return [rung for i, rung in enumerate(rungs) if rung not in rungs[:i]]


def choose(found: Sequence[Candidate], *, elastic: bool = False) -> Candidate:
    """The least late; of those that are about as late, the one that could carry most. ``elastic``:
    the cheapest of those that are on time, or about as late as the least late."""
    least = min(candidate.lateness for candidate in found)
    if elastic:
        close = [each for each in found if each.lateness <= max(1.0, least * (1 + TIE))]
        return min(close, key=lambda candidate: (candidate.price, candidate.lateness))
    close = [candidate for candidate in found if candidate.lateness <= least * (1 + TIE)]
    return max(close, key=lambda candidate: (candidate.headroom, -candidate.lateness))


def candidates(
    judge: Judge, best: Solution, terms: Terms, *, time_limit_s: float
) -> list[Candidate]:
    """Distinct plans with their dispatches, ``best`` first. ``terms`` are those that it keeps to,
    and so do all."""
    found = list(judge.dispatches(best.counts))
    headroom = found[0].headroom
    if headroom <= NOTHING:
        return found
    thrifty = best.goal == "thrift"
    others = _thrifty if thrifty else _gentle
    seen: list[Counts] = [best.counts]
    for solution in others(judge, terms, headroom, time_limit_s=time_limit_s):
        if solution.goal == "gentle":
            flow = best_flow(judge.table.instance(solution.counts), "headroom")
            assert flow is not None, "no flow at all is a flow"
            shares = spread(solution.shares)
            found.append(judge.candidate(solution.counts, shares, flow.headroom))
        if solution.counts not in seen:
            seen.append(solution.counts)
            found += judge.dispatches(solution.counts)
    plans = lean_plans if thrifty else uniform_plans
    for counts in plans(judge.table, best.counts, terms, judge.late):
        if counts not in seen:
            seen.append(counts)
            found += judge.dispatches(counts)
    return found


def _gentle(
    judge: Judge, terms: Terms, headroom: float, *, time_limit_s: float
) -> Iterator[Solution]:
    """The gentle plan of each load, and that one filled up."""
    table, first = judge.table, SLACK / headroom
    steps = np.geomspace(first, LOAD_MAX, LOADS) if first < LOAD_MAX else np.array([first])
    for load in steps:
        eased = replace(terms, load=float(load), cost=judge.alone(min(float(load), 1.0)))
        gentle = best_joint(table, "gentle", eased, time_limit_s=time_limit_s)
        if gentle is None:
            continue
        yield gentle
        filled = replace(terms, floor=gentle.counts)
        full = best_joint(table, "headroom", filled, time_limit_s=time_limit_s)
        if full is not None:
            yield full


def _thrifty(
    judge: Judge, terms: Terms, headroom: float, *, time_limit_s: float
) -> Iterator[Solution]:
    """The cheapest plan of each load that any can have."""
    del headroom
    for load in THRIFT_LOADS:
        lean = replace(terms, load=load)
        cheap = best_joint(judge.table, "thrift", lean, time_limit_s=time_limit_s)
        if cheap is not None:
            yield cheap
