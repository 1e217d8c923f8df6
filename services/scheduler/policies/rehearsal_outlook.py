"""What a rehearsal tells of types and replicas, as the figures of a decision."""

from collections.abc import Callable

import numpy as np

from services.scheduler.policies.capacity import Table, TypeDemand
from services.scheduler.policies.capacity_plan import Placed
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.rehearsal import Rehearsed
from shared.messages.decisions import DETAILS_MAX, ReplicaOutlook, TypeOutlook


def type_outlooks(
    table: Table,
    outcome: Rehearsed,
    between: Callable[[TypeDemand], tuple[float, float]],
) -> tuple[TypeOutlook, ...]:
    """The types of ``table``, which are those of the rehearsal; ``between``: the 10th and the 90th
    percentile of a type's arrivals."""
    found: list[TypeOutlook] = []
    for kind, fared in zip(table.types, outcome.types, strict=True):
        low, high = between(kind)
        found.append(
            TypeOutlook(
                model_id=kind.model_id,
                request_type=kind.name,
                arrivals_rps=kind.arrivals_rps,
                arrivals_rps_p10=low,
                arrivals_rps_p90=high,
                input_tokens=kind.input_tokens,
                output_tokens=kind.output_tokens,
                ttft_s_mean=fared.ttft_s.mean,
                ttft_s_p50=fared.ttft_s.p50,
                ttft_s_p99=fared.ttft_s.p99,
                tpot_s_mean=fared.tpot_s.mean,
                tpot_s_p50=fared.tpot_s.p50,
                tpot_s_p99=fared.tpot_s.p99,
                e2e_s_p99=fared.e2e_s.p99,
                goodput_share=fared.goodput_share,
            )
        )
    return tuple(found[:DETAILS_MAX])


def replica_outlooks(
    table: Table, placed: Placed, candidate: Candidate, outcome: Rehearsed
) -> tuple[ReplicaOutlook, ...]:
    """The replicas of ``placed``; times are those of their column. ``utilisation`` is in terms of
    the table's rates: 1 where just what meets the targets is sent."""
    index = {column: s for s, column in enumerate(table.columns)}
    found: list[ReplicaOutlook] = []
    for spec in placed.replicas[:DETAILS_MAX]:
        column = placed.columns[spec.replica_id]
        s, fared = index[column], outcome.columns.get(column)
        sent = table.demand * candidate.shares[s] / max(1, candidate.counts.get(column, 0))
        rates = table.rates[s]
        own = [j for j, kind in enumerate(table.types) if kind.model_id == spec.model_id]
        served = rates > 0
        found.append(
            ReplicaOutlook(
                replica_id=spec.replica_id,
                model_id=spec.model_id,
                parallelism=spec.parallelism,
                gpus=spec.gpus,
                utilisation=float(np.sum(sent[served] / rates[served])),
                arrivals_rps={table.types[j].name: float(sent[j]) for j in own if sent[j] > 0},
                rates_rps={table.types[j].name: float(rates[j]) for j in own if rates[j] > 0},
                ttft_s_p50=fared.ttft_s.p50 if fared else None,
                ttft_s_p99=fared.ttft_s.p99 if fared else None,
                tpot_s_p50=fared.tpot_s.p50 if fared else None,
                tpot_s_p99=fared.tpot_s.p99 if fared else None,
            )
        )
    return tuple(found)
