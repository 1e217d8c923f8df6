"""How late a plan is, by formulas: what ``joint_choice`` compares plans by.

    lateness = sum_j w[j] * E[ max(ttft99 / ttft_target, tpot99 / tpot_target) ]

with w[j] the share of type j among the requests, the expectation over the replicas it is sent to,
the targets those of its type, and the tails from ``joint_latency``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from services.scheduler.policies.interface import Problem
from services.scheduler.policies.joint_latency import Load, Tail, tails
from shared.cost.model import CostModel
from shared.slo import SloTarget

LOAD_MAX = 0.9  # beyond, waiting grows faster than any shape can make up for
NOTHING = 1e-9  # headroom or requests/s: a solver's zero
SLACK = 1.02  # at exactly 1 / t* rounding may leave nothing feasible


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
