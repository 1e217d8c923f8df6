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

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.capacity_plan import spread
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.interface import Needs
from services.scheduler.policies.joint import Solution, Terms, best_joint
from services.scheduler.policies.joint_judge import (
    LOAD_MAX,
    NOTHING,
    SLACK,
    Candidate,
    Judge,
    LatencySource,
)
from services.scheduler.policies.joint_uniform import Counts, lean_plans, uniform_plans
from services.scheduler.policies.minimums import ladder

__all__ = ["Candidate", "Judge", "LatencySource", "candidates", "choose", "solve_capacity"]

LOADS = 4  # steps from the load at greatest headroom to ``LOAD_MAX``
TIE = 0.05  # lateness that differs less is a tie: its prediction is no better
THRIFT_LOADS = (LOAD_MAX, 0.75, 0.6, 0.45, 0.3)  # of the cheapest plans to be compared
NO_NEEDS = Needs()


def solve_capacity(
    table: Table, models: Sequence[str], *, time_limit_s: float, needs: Needs = NO_NEEDS
) -> tuple[Solution | None, Terms]:
    """The plan of greatest headroom, or if ``needs.elastic`` and GPUs suffice, the cheapest; and
    the terms that it keeps to, for ``candidates``. They are what is needed, or where GPUs do not
    suffice, less: first no replica can be lost any more, then models get one replica, then only
    those that anything is expected of. If no plan serves some of every type, the one that serves
    most requests."""
    for least in ladder(table, models, needs.replicas_min):
        for survive in range(needs.survive, -1, -1):
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
    for least in ladder(table, models, needs.replicas_min):
        terms = Terms(least=least)
        found = best_joint(table, "served", terms, time_limit_s=time_limit_s)
        if found is not None and found.objective > NOTHING:
            return found, terms
    return None, Terms()


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
