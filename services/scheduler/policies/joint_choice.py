"""Which of the near-optimal plans to take: the one whose slowest requests come closest to target.

Fluid capacity says how much a plan could carry, not how fast it answers what does arrive. Under
light load many plans carry it: sixteen small replicas carry most, two large ones answer soonest.
So plans are compared by *lateness*

    sum_j w[j] * E[ max(ttft99 / ttft_target, tpot99 / tpot_target) ]

with w[j] the share of type j among the requests, the expectation over the replicas it is sent to,
and the tails from ``joint_latency``: below 1 the predicted 99th percentiles meet their targets.
Overload shows in it as waiting, so one number compares plans at any load.

Candidates are few, and each is the exact optimum of a program in ``joint``:

- the plan of greatest headroom t*;
- for loads u from 1 / t* (all of that capacity needed) to ``LOAD_MAX``: the plan that minimises the
  lateness of types on shapes, were every replica loaded u with each type alone (which makes it
  linear: "gentle"), then filled up with what carries most on the GPUs that this leaves.

Each is dispatched by greatest headroom, by least work and, for gentle plans, as their own program
did; all are then compared under the load and the mix that their replicas would really see. Of
those within ``TIE`` of the best, the one of most headroom is taken: it uses GPUs that would idle.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.scheduler.policies.capacity import Column, RateSource, ReplicaKind, Table, kind_of
from services.scheduler.policies.capacity_plan import spread
from services.scheduler.policies.flow import Array, best_flow
from services.scheduler.policies.interface import Problem
from services.scheduler.policies.joint import Goal, Solution, Terms, best_joint
from services.scheduler.policies.joint_latency import Load, Tail, tails
from shared.cost.model import CostModel

LOAD_MAX = 0.9  # beyond, waiting grows faster than any shape can make up for
LOADS = 4  # steps from the load at greatest headroom to ``LOAD_MAX``
TIE = 0.05  # lateness that differs less is a tie: its prediction is no better
NOTHING = 1e-9  # headroom or requests/s: a solver's zero
SLACK = 1.02  # of the first step: at exactly 1 / t* rounding may leave nothing feasible


class LatencySource(RateSource, Protocol):
    def model(self, kind: ReplicaKind) -> CostModel:
        """The cost model of one replica, which is known to fit."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidate:
    """``shares`` [S, J] of each type sum to 1 where any replica can serve it."""

    counts: Mapping[Column, int]
    shares: Array
    headroom: float
    lateness: float


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
        )

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
            late += left * kind.arrivals_rps * self.horizon_s / self._ttft_target_s(j)
        return late / total

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
        target = self.problem.targets[self.table.types[j].model_id]
        return max(tail.ttft_s / target.ttft_s, tail.tpot_s / target.tpot_s)

    def _ttft_target_s(self, j: int) -> float:
        return self.problem.targets[self.table.types[j].model_id].ttft_s


def solve_capacity(
    table: Table, models: Sequence[str], *, time_limit_s: float
) -> tuple[Solution | None, tuple[str, ...]]:
    """The plan of greatest headroom, and the models of which it has a replica whatever is expected
    of them: all of ``models`` that fit; if the GPUs do not suffice, those that anything is expected
    of. If no plan serves some of every type, the one that serves most requests."""
    fitting = {column.model_id for column in table.columns}
    expected = {kind.model_id for kind in table.types}
    every = tuple(model_id for model_id in models if model_id in fitting)
    busy = tuple(model_id for model_id in every if model_id in expected)
    goals: list[tuple[Goal, tuple[str, ...]]] = [
        ("headroom", every),
        ("headroom", busy),
        ("served", every),
        ("served", busy),
        ("served", ()),
    ]
    for goal, wanted in dict.fromkeys(goals):
        found = best_joint(table, goal, Terms(wanted=wanted), time_limit_s=time_limit_s)
        if found is not None and found.objective > NOTHING:
            return found, wanted
    return None, ()


def choose(found: Sequence[Candidate]) -> Candidate:
    """The least late; of those that are about as late, the one that could carry most."""
    least = min(candidate.lateness for candidate in found)
    close = [candidate for candidate in found if candidate.lateness <= least * (1 + TIE)]
    return max(close, key=lambda candidate: (candidate.headroom, -candidate.lateness))


def candidates(
    judge: Judge, best: Solution, wanted: Collection[str], *, time_limit_s: float
) -> list[Candidate]:
    """Distinct plans with their dispatches, the one of greatest headroom first."""
    table = judge.table
    found = list(judge.dispatches(best.counts))
    headroom = found[0].headroom
    if headroom <= NOTHING:
        return found
    first = SLACK / headroom
    steps = np.geomspace(first, LOAD_MAX, LOADS) if first < LOAD_MAX else np.array([first])
    seen = [best.counts]
    for load in steps:
        terms = Terms(wanted=wanted, load=float(load), cost=judge.alone(min(float(load), 1.0)))
        gentle = best_joint(table, "gentle", terms, time_limit_s=time_limit_s)
        if gentle is None:
            continue
        filled = Terms(wanted=wanted, floor=gentle.counts)
        full = best_joint(table, "headroom", filled, time_limit_s=time_limit_s)
        for solution in (gentle, full):
            if solution is not None and solution.counts not in seen:
                seen.append(solution.counts)
                found += judge.dispatches(solution.counts)
        flow = best_flow(table.instance(gentle.counts), "headroom")
        assert flow is not None, "no flow at all is a flow"
        found.append(judge.candidate(gentle.counts, spread(gentle.shares), flow.headroom))
    return found
