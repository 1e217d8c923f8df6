"""Corrects routing weights between two decisions, by what the replicas bear: pure, replicas stay.

A router bends the plan's shares by load at each request already (services/router/policies.py), and
needs the imbalance to go on for that: a proportional controller. What is left is what persists: a
replica that serves slower than it was planned to, or a burst of one type on the replicas that are
kept for it. (One that stalls altogether is no case for weights: its worker's word ends, and it is
planned around.) Per model, with s the strain of a replica, smoothed over ``SMOOTH_S``:

    s = max(waiting / max(running, FEW), step time / median step time of its like - 1)
    e = s - mean of s over the replicas of its part, by their shares; less ``DEAD``, nearer to 0
    integral' = RATE * e - integral / FORGET_S
    factor = exp(-(GAIN * e + integral)), within 1 / FACTOR_MAX and FACTOR_MAX

which is the textbook PI controller with a dead band, a leak and a bound (K. J. Astrom and
T. Hagglund, "Advanced PID Control", 2006): the integral takes away what persists, the proportional
part damps the loop that a queue closes, and by the leak a plan's own shares return once the
replicas are even. "Its like" are the model's other replicas of the same parallelism.

A part are the replicas that mainly serve the same types: a plan may keep types apart, so that a
burst of one is not everybody's, and corrections between parts would undo that. The row of any type
is the mean of all types' rows: it says nothing of who serves which.

Factors scale shares, so that a replica without a share of a type keeps none, with one exception:
when all that serve a type have broken and others of the model are idle, these are lent up to
``LENT_MAX`` of it, as long as their KV cache is no smaller.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

from services.scheduler.policies.weights import ANY_TYPE, rounded
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import ReplicaReport

Weights = Mapping[str, Mapping[str, float]]
"""``weights[type][replica_id]``, as a plan has them."""

SMOOTH_S = 5.0
DEAD = 0.5  # a queue of half of what runs, or steps half as long again: within what plans err by
GAIN = 0.4
RATE = 0.03  # per second
FORGET_S = 300.0
FACTOR_MAX = 2.0
FEW = 4  # so few running requests, and one that waits is chance
STRAIN_MAX = 3.0  # of one that broke
QUEUE_MAX = 2.5  # strain of a queue, however long
STEP_S_MAX = 5.0  # between two corrections: a gap in time is no evidence
EVEN = 0.02  # so small a correction (of a factor's logarithm) is none
BROKEN, IDLE = 2.9, 0.25  # strains: of one that broke a while ago; of one with next to no queue
MAIN = 0.25  # of the largest share of a row: who has less of a type does not mainly serve it
SAME = 1e-4  # shares that differ by less are alike: they are rounded
LENT_MAX = 0.3
LENT_RATE = 0.02  # per second
CHANGE_MIN = 0.05  # of a model's requests: less is not worth a new plan


@dataclass(frozen=True, slots=True)
class Loan:
    """Of one row: the share lent, to whom."""

    share: float
    to: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """What has been learnt of the replicas in force; bounded by them and by the plan's rows."""

    strains: Mapping[str, float] = field(default_factory=dict[str, float])  # smoothed
    errors: Mapping[str, float] = field(default_factory=dict[str, float])  # beyond the dead band
    integrals: Mapping[str, float] = field(default_factory=dict[str, float])
    loans: Mapping[tuple[str, str], Loan] = field(default_factory=dict[tuple[str, str], Loan])

    def of(self, replica_ids: Collection[str]) -> "Bias":
        """What it says of these replicas."""
        kept = [
            {id_: value for id_, value in values.items() if id_ in replica_ids}
            for values in (self.strains, self.errors, self.integrals)
        ]
        loans = {
            key: loan for key, loan in self.loans.items() if set(loan.to).issubset(replica_ids)
        }
        return Bias(strains=kept[0], errors=kept[1], integrals=kept[2], loans=loans)

    @property
    def even(self) -> bool:
        """Whether it suggests nothing."""
        return not self.loans and all(self.factor(id_) == 1.0 for id_ in self.integrals)

    def factor(self, replica_id: str) -> float:
        """What the shares of that replica are multiplied by, before rows are made whole again."""
        push = -GAIN * self.errors.get(replica_id, 0.0) - self.integrals.get(replica_id, 0.0)
        return 1.0 if abs(push) < EVEN else exp(_within(push, log(FACTOR_MAX)))


def advanced(
    bias: Bias,
    replicas: Sequence[ReplicaSpec],
    rows: Weights,
    loads: Iterable[ReplicaReport],
    *,
    seconds: float,
) -> Bias:
    """``bias`` after ``seconds`` more under ``loads``, the newest of each replica. ``rows`` are the
    weights as they were decided. A replica that is paused is as it was before."""
    seconds = _within(seconds, STEP_S_MAX)
    reports = {report.replica_id: report for report in loads}
    now = _strains(replicas, reports)
    new = 1.0 - exp(-seconds / SMOOTH_S)
    strains = {
        id_: (old := bias.strains.get(id_, 0.0)) + new * (strain - old)
        for id_, strain in now.items()
    }
    errors: dict[str, float] = {}
    for model_id in {spec.model_id for spec in replicas}:
        own = [s.replica_id for s in replicas if s.model_id == model_id and s.replica_id in strains]
        for part in parts(own, rows):
            errors |= _errors({id_: strains[id_] for id_ in part}, rows)
    integrals: dict[str, float] = {}
    for id_, error in errors.items():
        former = bias.integrals.get(id_, 0.0)
        after = former + seconds * (RATE * error - former / FORGET_S)
        integrals[id_] = _within(after, log(FACTOR_MAX))
    still = [id_ for id_, report in reports.items() if report.phase == "paused"]
    for values, before in (
        (strains, bias.strains), (errors, bias.errors), (integrals, bias.integrals)
    ):  # fmt: skip
        values |= {id_: before[id_] for id_ in still if id_ in before}
    loans = _loans(bias.loans, replicas, rows, strains, reports, seconds=seconds)
    return Bias(strains=strains, errors=errors, integrals=integrals, loans=loans)


def corrected(
    rows: Weights, replicas: Sequence[ReplicaSpec], bias: Bias
) -> dict[str, dict[str, float]]:
    """``rows`` with the shares that ``bias`` suggests. Each model keeps its part of each row, and
    rows sum to 1; without a bias they are as they were."""
    models = {spec.replica_id: spec.model_id for spec in replicas}
    factors = {replica_id: bias.factor(replica_id) for replica_id in models}
    result: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        by_model: dict[str, dict[str, float]] = {}
        for replica_id, share in row.items():
            by_model.setdefault(models.get(replica_id, ""), {})[replica_id] = share
        changed: dict[str, float] = {}
        for model_id, part in by_model.items():
            changed |= _part(part, factors, bias.loans.get((model_id, name)))
        result[name] = dict(row) if changed == row else rounded(changed)
    return result


def parts(own: Sequence[str], rows: Weights) -> list[list[str]]:
    """One model's replicas by the types that they mainly serve: two are in one part if a row, or a
    chain of rows, has both with ``MAIN`` of its largest share or more. The row of any type counts,
    as those for which it stands in, only where the model has no other."""
    part_of = {replica_id: index for index, replica_id in enumerate(own)}
    every = [{id_: row[id_] for id_ in own if row.get(id_, 0.0) > 0.0} for row in rows.values()]
    mixed = rows.get(ANY_TYPE, {})
    typed = [shares for shares in every if any(_unlike(shares, mixed, id_) for id_ in own)]
    for shares in typed or every:
        least = MAIN * max(shares.values(), default=0.0)
        joined = {part_of[id_] for id_, share in shares.items() if share >= least}
        if len(joined) > 1:
            into = min(joined)
            part_of = {id_: into if part in joined else part for id_, part in part_of.items()}
    found: dict[int, list[str]] = defaultdict(list)
    for replica_id in own:
        found[part_of[replica_id]].append(replica_id)
    return list(found.values())


def _unlike(one: Mapping[str, float], other: Mapping[str, float], replica_id: str) -> bool:
    return abs(one.get(replica_id, 0.0) - other.get(replica_id, 0.0)) > SAME


def _strains(
    replicas: Sequence[ReplicaSpec], reports: Mapping[str, ReplicaReport]
) -> dict[str, float]:
    """Of the replicas that serve, or broke; one that has not reported is left out."""
    strains: dict[str, float] = {}
    steps_s: dict[tuple[str, str], list[float]] = defaultdict(list)
    for spec in replicas:
        report = reports.get(spec.replica_id)
        if report is not None and report.phase == "serving" and report.running >= FEW:
            insort(steps_s[spec.model_id, spec.parallelism], report.step_s)
    for spec in replicas:
        report = reports.get(spec.replica_id)
        if report is None or report.phase not in ("serving", "failed"):
            continue
        if report.phase == "failed":
            strains[spec.replica_id] = STRAIN_MAX
            continue
        queue = report.waiting / max(report.running, FEW)
        usual_s = _usual_s(steps_s[spec.model_id, spec.parallelism], report)
        slow = report.step_s / usual_s - 1.0 if usual_s > 0.0 else 0.0
        strains[spec.replica_id] = min(QUEUE_MAX, max(queue, slow))
    return strains


def _usual_s(steps_s: Sequence[float], report: ReplicaReport) -> float:
    """Median step time of those like it, which are all of ``steps_s`` (sorted) but its own; 0 when
    there are none, or it has too few requests to compare."""
    count = len(steps_s) - 1
    if report.running < FEW or count < 1:
        return 0.0
    own = bisect_left(steps_s, report.step_s)
    low, high = (count - 1) // 2, count // 2
    return (steps_s[low + (low >= own)] + steps_s[high + (high >= own)]) / 2.0


def _errors(strains: Mapping[str, float], rows: Weights) -> dict[str, float]:
    """Of one model's replicas: how far each is from their mean, beyond the dead band."""
    shares = {id_: sum(row.get(id_, 0.0) for row in rows.values()) for id_ in strains}
    total = sum(shares.values())
    if total <= 0.0:
        return dict.fromkeys(strains, 0.0)
    mean = sum(strains[id_] * share for id_, share in shares.items()) / total
    return {id_: _beyond(strain - mean, DEAD) for id_, strain in strains.items()}


def _loans(
    former: Mapping[tuple[str, str], Loan],
    replicas: Sequence[ReplicaSpec],
    rows: Weights,
    strains: Mapping[str, float],
    reports: Mapping[str, ReplicaReport],
    *,
    seconds: float,
) -> dict[tuple[str, str], Loan]:
    """Loans grow while all that serve a type are broken and somebody is idle, and are paid back as
    fast."""
    loans: dict[tuple[str, str], Loan] = {}
    for model_id in sorted({spec.model_id for spec in replicas}):
        known = [s.replica_id for s in replicas if s.model_id == model_id]
        for name, row in rows.items():
            before = former.get((model_id, name))
            strained = all(
                strains.get(id_, 0.0) >= BROKEN for id_ in known if row.get(id_, 0.0) > 0.0
            )
            serving = (
                {id_ for id_ in known if row.get(id_, 0.0) > 0.0} if strained or before else ()
            )
            if not serving:
                continue
            room = min((reports[i].kv_blocks_total for i in serving if i in reports), default=0)
            idle = tuple(
                id_
                for id_ in known
                if id_ not in serving
                and strains.get(id_, STRAIN_MAX) <= IDLE
                and reports[id_].kv_blocks_total >= room
            )
            step = LENT_RATE * seconds if strained and idle else -LENT_RATE * seconds
            share = min(LENT_MAX, (before.share if before else 0.0) + step)
            to = idle or tuple(
                id_ for id_ in (before.to if before else ()) if id_ in known and id_ not in serving
            )
            if share > 0.0 and to:
                loans[model_id, name] = Loan(share, to)
    return loans


def _part(
    part: Mapping[str, float], factors: Mapping[str, float], loan: Loan | None
) -> dict[str, float]:
    """One model's part of a row; its sum stays."""
    if loan is None and len({factors.get(id_, 1.0) for id_, share in part.items() if share}) <= 1:
        return dict(part)
    total = sum(part.values())
    scaled = {
        replica_id: share * factors.get(replica_id, 1.0) for replica_id, share in part.items()
    }
    kept = total * (1.0 - (loan.share if loan else 0.0)) / (sum(scaled.values()) or 1.0)
    shares = {replica_id: share * kept for replica_id, share in scaled.items()}
    for replica_id in loan.to if loan else ():
        lent = total * (loan.share if loan else 0.0) / len(loan.to if loan else ())
        shares[replica_id] = shares.get(replica_id, 0.0) + lent
    return shares


def _within(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def _beyond(value: float, dead: float) -> float:
    return value - _within(value, dead)
