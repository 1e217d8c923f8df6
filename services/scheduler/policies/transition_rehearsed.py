"""Plans are played through before any replica moves: formulas rank plans, and err.

The plan in force, the one chosen and the next best are rehearsed under the usual demand with the
last minutes' arrivals (``rehearsal_choice``). What is then compared is lateness as it was seen. Of
the plan in force that is, by type,

    late = sum_j w[j] * max(ttft99[j] / ttft_target[j], tpot99[j] / tpot_target[j])

and of any other as much more or less as it is worth less or more than that one: tails of the
slowest type alone would say nothing of how many are in time. Where GPUs may be left unused, where
only being on time counts, it is ``late`` for all.

Lateness of times that are not rehearsed, when only some replicas serve, is scaled by how far the
formulas were off for the plan in force.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.horizon_judge import Weighed
from services.scheduler.policies.joint_judge import Candidate
from services.scheduler.policies.rehearsal import Rehearsed
from services.scheduler.policies.rehearsal_choice import Ranking, past_of, rehearsed

KEEP = 4  # of the plans compared, beside the one in force and the one chosen
SCALE_MAX = 10.0  # formulas that are farther off say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """``kept`` with the lateness that was seen, and the plans that were played, the best first,
    with theirs; ``scale``: of the plan in force, lateness seen over lateness predicted."""

    ranking: Ranking
    kept: Candidate
    plans: tuple[Candidate, ...]
    scale: float

    @property
    def choice(self) -> Candidate:
        return self.plans[0]


def tried(
    judge: Weighed,
    found: Sequence[Candidate],
    kept: Candidate,
    choice: Candidate,
    *,
    horizon_s: float,
    elastic: bool,
) -> Tried:
    """``found``, ``kept`` and ``choice``, played. ``horizon_s``: the forecast's."""
    drawn = past_of(judge.usual, horizon_s=horizon_s)
    ranking = rehearsed(
        judge.usual, found, keep=KEEP, always=(kept, choice), elastic=elastic, drawn=drawn
    )
    own = ranking.of(kept)
    assert own is not None, "the plan in force is always rehearsed"
    table = judge.usual.table
    stays = replace(kept, lateness=late(table, own.outcome))
    plans: list[Candidate] = []
    for each in ranking.played:
        seen = late(table, each.outcome)
        if not elastic and own.worth > 0.0 and each.worth > 0.0:
            seen = stays.lateness * own.worth / each.worth
        plans.append(replace(each.candidate, lateness=seen))
    scale = stays.lateness / kept.lateness if kept.lateness > 0.0 else 1.0
    return Tried(
        ranking=ranking,
        kept=stays,
        plans=tuple(plans),
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
