"""A switch that is at stake is played through first: formulas rank plans, and err.

The plan in force, the one chosen and the next best are rehearsed under the usual demand, with the
same requests (``rehearsal_choice``). What is then compared is lateness as it was seen, by type:

    sum_j w[j] * max(ttft99[j] / ttft_target[j], tpot99[j] / tpot_target[j])

Lateness of times that are not rehearsed, when only some replicas serve, is scaled by how far the
formulas were off for the plan in force.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.rehearsal import Rehearsed
from services.scheduler.policies.rehearsal_choice import Ranking, rehearsed

KEEP = 4  # of the plans compared, beside the one in force and the one chosen
SCALE_MAX = 10.0  # formulas that are farther off say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """``kept`` and ``choice`` with the lateness that was seen; ``scale``: of the plan in force,
    lateness seen over lateness predicted."""

    ranking: Ranking
    kept: Candidate
    choice: Candidate
    scale: float


def played(
    judge: Weighed, found: Sequence[Candidate], kept: Candidate, choice: Candidate, *, elastic: bool
) -> Played:
    """The best of ``found``, ``kept`` and ``choice`` as the choice."""
    ranking = rehearsed(judge.usual, found, keep=KEEP, always=(kept, choice), elastic=elastic)
    seen = ranking.of(kept)
    assert seen is not None, "the plan in force is always rehearsed"
    stays = replace(kept, lateness=late(judge.usual.table, seen))
    goes = replace(ranking.best, lateness=late(judge.usual.table, ranking.outcome))
    scale = stays.lateness / kept.lateness if kept.lateness > 0.0 else 1.0
    return Played(
        ranking=ranking,
        kept=stays,
        choice=goes,
        scale=min(SCALE_MAX, max(1.0 / SCALE_MAX, scale)),
    )


def late(table: Table, outcome: Rehearsed) -> float:
    """Lateness of all types that any request came of."""
    total = weights = 0.0
    for kind, fared in zip(table.types, outcome.types, strict=True):
        if fared.ttft_s.p99 is None:
            continue
        ratio = fared.ttft_s.p99 / kind.target.ttft_s
        if fared.tpot_s.p99 is not None:
            ratio = max(ratio, fared.tpot_s.p99 / kind.target.tpot_s)
        total += kind.arrivals_rps * ratio
        weights += kind.arrivals_rps
    return total / weights if weights else 0.0
