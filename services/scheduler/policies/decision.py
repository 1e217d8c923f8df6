"""The figures of one decision, as ``shared/messages/decisions.py`` has them.

How requests should fare is predicted for the usual demand; capacity (``headroom``) is told of the
high one, which plans are made for.
"""

from collections.abc import Iterable, Mapping
from math import ceil, isfinite

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.capacity_plan import Placed, brief
from services.scheduler.policies.horizon import Foreseen
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint import Solution, Terms
from services.scheduler.policies.joint_choice import Candidate
from services.scheduler.policies.joint_latency import Load, Tail, tails
from shared.messages.decisions import (
    ALTERNATIVES_MAX,
    DETAILS_MAX,
    PlanOutlook,
    ReplicaOutlook,
    TypeOutlook,
)

NOTHING = 1e-9  # times the demand: a solver's zero


def plan_outlook(judge: Weighed, candidate: Candidate, why: str) -> PlanOutlook:
    """One line."""
    counts = candidate.counts
    return PlanOutlook(
        plan=brief(counts),
        gpus=gpus_of(counts),
        headroom=candidate.headroom,
        lateness=candidate.lateness,
        price_per_hour=price_of(judge, counts),
        why=why,
    )


def alternatives(
    judge: Weighed, chosen: Candidate, found: Iterable[Candidate]
) -> tuple[PlanOutlook, ...]:
    """The other plans that were compared, the least late first, and what each lost by."""
    best: dict[tuple[tuple[Column, int], ...], Candidate] = {}
    for candidate in found:
        key = tuple(sorted(candidate.counts.items()))
        if key != tuple(sorted(chosen.counts.items())):
            best[key] = min(best.get(key, candidate), candidate, key=lambda each: each.lateness)
    ranked = sorted(best.values(), key=lambda each: (each.lateness, -each.headroom))
    return tuple(
        plan_outlook(judge, each, lost_by(judge, each, chosen))
        for each in ranked[:ALTERNATIVES_MAX]
    )


def lost_by(judge: Weighed, loser: Candidate, winner: Candidate) -> str:
    """In words."""
    if winner.headroom >= 1.0 > loser.headroom:
        return f"carries only {loser.headroom:.3g} times the demand"
    if loser.lateness > winner.lateness:
        more = loser.lateness / winner.lateness - 1.0 if winner.lateness > 0.0 else np.inf
        return f"its slowest 1 % are {more:.0%} later" if isfinite(more) else "later"
    if price_of(judge, loser.counts) > price_of(judge, winner.counts):
        return "costs more per hour, and the targets do not need it"
    return f"as late, but carries {loser.headroom:.3g} times the demand only"


def price_of(judge: Weighed, counts: Mapping[Column, int]) -> float:
    """Per hour, by the operator's prices."""
    hourly = Terms(prices=judge.problem.needs.gpu_prices).hourly(judge.table)
    each = dict(zip(judge.table.columns, hourly, strict=True))
    return float(sum(count * each[column] for column, count in counts.items()))


def gpus_of(counts: Mapping[Column, int]) -> int:
    return sum(column.shape.gpus * count for column, count in counts.items())


def replica_outlooks(
    judge: Weighed, candidate: Candidate, placed: Placed
) -> tuple[ReplicaOutlook, ...]:
    """Each replica and what it should bear, by id."""
    table = judge.usual.table
    index = {column: s for s, column in enumerate(table.columns)}
    fares = _fares(judge, candidate)
    found: list[ReplicaOutlook] = []
    for spec in placed.replicas[:DETAILS_MAX]:
        column = placed.columns[spec.replica_id]
        s, copies = index[column], max(1, candidate.counts.get(column, 0))
        each = candidate.shares[s] / copies
        sent = {
            kind.name: kind.arrivals_rps * float(share)
            for kind, share in zip(table.types, each, strict=True)
            if share > 0
        }
        rates = {
            kind.name: float(rate)
            for kind, rate in zip(table.types, table.rates[s], strict=True)
            if rate > 0
        }
        own = [tail for (row, _), tail in fares.items() if row == s]
        found.append(
            ReplicaOutlook(
                replica_id=spec.replica_id,
                model_id=spec.model_id,
                parallelism=spec.parallelism,
                gpus=spec.gpus,
                utilisation=max((tail.utilisation for tail in own), default=0.0),
                arrivals_rps=sent,
                rates_rps=rates,
                ttft_s_p99=max((tail.ttft_s for tail in own), default=None),
                tpot_s_p99=max((tail.tpot_s for tail in own), default=None),
            )
        )
    return tuple(found)


def type_outlooks(
    judge: Weighed, candidate: Candidate, foreseen: Foreseen
) -> tuple[TypeOutlook, ...]:
    """Each type as it was planned for; its percentiles are means over where it is sent."""
    table = judge.usual.table
    fares = _fares(judge, candidate)
    found: list[TypeOutlook] = []
    for j, kind in enumerate(table.types[:DETAILS_MAX]):
        line = foreseen.line(kind)
        own = [(candidate.shares[s, j], tail) for (s, of), tail in fares.items() if of == j]
        total = float(sum(share for share, _ in own))
        found.append(
            TypeOutlook(
                model_id=kind.model_id,
                request_type=kind.name,
                arrivals_rps=kind.arrivals_rps,
                arrivals_rps_p10=line.low_rps if line else kind.arrivals_rps,
                arrivals_rps_p90=line.high_rps if line else kind.arrivals_rps,
                input_tokens=kind.input_tokens,
                output_tokens=kind.output_tokens,
                ttft_s_p99=sum(w * tail.ttft_s for w, tail in own) / total if total else None,
                tpot_s_p99=sum(w * tail.tpot_s for w, tail in own) / total if total else None,
            )
        )
    return tuple(found)


def missing(table: Table, best: Solution, shortcomings: str, left_out: str) -> tuple[str, ...]:
    """What cannot be served, and what it would take; empty when nothing is missing."""
    notes = [shortcomings, left_out]
    if best.goal == "served":
        share = best.objective / max(NOTHING, float(table.demand.sum()))
        notes.append(f"the GPUs on offer serve {share:.0%} of the requests expected at most")
    elif best.objective < 1.0:
        more = ceil(table.gpus() * (1.0 / max(NOTHING, best.objective) - 1.0))
        notes.append(
            f"the GPUs on offer carry {best.objective:.3g} times the demand: about {more} more "
            "like them, or as much less demand, would do"
        )
    return tuple(note for note in notes if note)


def _fares(judge: Weighed, candidate: Candidate) -> dict[tuple[int, int], Tail]:
    """How each type should fare on each column that it is sent to, at the usual demand."""
    usual, found = judge.usual, dict[tuple[int, int], Tail]()
    for s, column in enumerate(usual.table.columns):
        count = candidate.counts.get(column, 0)
        types = [int(j) for j in np.flatnonzero(candidate.shares[s])] if count else []
        if not types:
            continue
        loads = [
            Load(
                arrivals_rps=usual.table.types[j].arrivals_rps
                * float(candidate.shares[s, j])
                / count,
                input_tokens=usual.table.types[j].input_tokens,
                output_tokens=usual.table.types[j].output_tokens,
            )
            for j in types
        ]
        seen = tails(usual.model(column), loads, usual.problem.limits, horizon_s=usual.horizon_s)
        found |= {(s, j): tail for j, tail in zip(types, seen, strict=True)}
    return found
