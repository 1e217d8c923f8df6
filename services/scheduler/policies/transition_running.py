"""How many requests run on each replica: what a switch would pause."""

from collections.abc import Iterable
from math import isfinite

import numpy as np

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint_choice import Candidate
from services.scheduler.policies.transition_columns import columns_of
from shared.cost.latency import latency
from shared.messages.plans import ReplicaSpec


def running(judge: Weighed, candidate: Candidate, specs: Iterable[ReplicaSpec]) -> dict[str, float]:
    """By replica: what it reports, running and waiting, else what Little's law makes of the usual
    demand as ``candidate`` dispatches it; as many as fit where that is more than it can bear."""
    reported = {
        report.replica_id: float(report.running + report.waiting) for report in judge.problem.loads
    }
    found: dict[str, float] = {}
    expected: dict[Column, float] = {}
    for replica_id, column in columns_of(judge.table, specs).items():
        if replica_id not in reported and column not in expected:
            expected[column] = _expected(judge, candidate, column)
        found[replica_id] = reported.get(replica_id, expected.get(column, 0.0))
    return found


def _expected(judge: Weighed, candidate: Candidate, column: Column) -> float:
    table, limits = judge.usual.table, judge.problem.limits
    s, count = table.columns.index(column), candidate.counts.get(column, 0)
    if not count:
        return 0.0
    rps = table.demand * candidate.shares[s] / count
    total = float(rps.sum())
    if total <= 0.0:
        return 0.0
    inputs = np.array([kind.input_tokens for kind in table.types])
    outputs = np.array([kind.output_tokens for kind in table.types])
    seen = latency(
        judge.model(column),
        requests_per_s=total,
        input_tokens=float(rps @ inputs) / total,
        output_tokens=float(rps @ outputs) / total,
        limits=limits,
    )
    return total * seen.e2e_s if isfinite(seen.e2e_s) else float(limits.running_max)
