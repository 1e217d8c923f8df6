"""The best few plans, played through: which of them to take, and what the others lost by.

    ranking = rehearsed(judge, found)            # found: candidates(...) of joint_choice
    ranking.best, ranking.outcome                # the Candidate to take, and how it fared
    ranking.alternatives                         # PlanOutlook of the others, the next best first
    ranking.of(candidate)                        # how one fared that was rehearsed, else None

Of plans with the same replicas the least late dispatch is kept, of all plans the ``keep`` least
late, and with them the least late uniform one and those that are given as ``always``. All are
rehearsed with the same requests, and ranked by

    1. goodput: the share of requests that meet both targets of their SLO class; within
       ``GOODPUT_TIE`` of the best is a tie
    2. where GPUs may be left unused ("elastic"), the price
    3. the 99th percentile of E2E; within ``P99_TIE`` of the best is a tie
    4. headroom: what can be carried if the forecast is wrong
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.joint_judge import Candidate, Judge
from services.scheduler.policies.rehearsal import Drawn, Rehearsed, Scene, rehearse, requests
from shared.messages.decisions import ALTERNATIVES_MAX, PlanOutlook

KEEP = 6
SECONDS = (60.0, 300.0)  # of a rehearsal, at least and at most
REQUESTS = 1500.0  # that are to come in that time: less, and the slowest 1 % are but a few
GOODPUT_TIE = 0.01
P99_TIE = 0.03
SEED = 1
PRICE_TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A plan, and how it fared."""

    candidate: Candidate
    outcome: Rehearsed

    @property
    def goodput_share(self) -> float:
        share = self.outcome.whole.goodput_share
        return 1.0 if share is None else share

    @property
    def e2e_s_p99(self) -> float:
        return self.outcome.whole.e2e_s.p99 or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """``played``, the best first; ``alternatives``: all but the best, those that were not rehearsed
    last, and not more of them than a decision tells of."""

    played: tuple[Played, ...]
    alternatives: tuple[PlanOutlook, ...]

    @property
    def best(self) -> Candidate:
        return self.played[0].candidate

    @property
    def outcome(self) -> Rehearsed:
        return self.played[0].outcome

    def of(self, candidate: Candidate) -> Rehearsed | None:
        return next((each.outcome for each in self.played if each.candidate is candidate), None)


def rehearsed(  # noqa: PLR0913  # how much, how long, with what
    judge: Judge,
    found: Sequence[Candidate],
    *,
    keep: int = KEEP,
    seconds: float | None = None,
    seed: int = SEED,
    drawn: Drawn | None = None,
    always: Sequence[Candidate] = (),
    elastic: bool = False,
) -> Ranking:
    """The ranking of ``found``, of which there is at least one, and ``always``. ``drawn``: the
    requests; None: what the judge's table expects, for ``seconds`` or as long as it takes for
    ``REQUESTS`` of them to come."""
    if drawn is None:
        drawn = requests(judge.table, seconds=seconds or _seconds(judge), seed=seed)
    scene = scene_of(judge)
    distinct = _distinct(found, elastic=elastic)
    kept = distinct[:keep]
    kept += [each for each in distinct[keep:] if _uniform(each)][:1]
    kept += [each for each in always if not any(each is other for other in kept)]
    played = [
        Played(candidate=each, outcome=rehearse(scene, each.counts, each.shares, drawn))
        for each in kept
    ]
    ranked = _ranked(played, elastic=elastic)
    others = [
        outlook(each.candidate, _lost_by(each, ranked[0], elastic=elastic), each.outcome)
        for each in ranked[1:]
    ]
    late = ranked[0].candidate.lateness
    others += [
        outlook(
            each, f"slowest 1 % at {each.lateness:.3g} of target against {late:.3g}, by formula"
        )
        for each in distinct
        if not any(each is other for other in kept)
    ]
    return Ranking(played=tuple(ranked), alternatives=tuple(others[:ALTERNATIVES_MAX]))


def scene_of(judge: Judge) -> Scene:
    """What its plans have in common."""
    return Scene(
        table=judge.table,
        model_of=judge.model,
        limits=judge.problem.limits,
        goals=judge.goals(),
    )


def outlook(candidate: Candidate, why: str, outcome: Rehearsed | None = None) -> PlanOutlook:
    """A plan in one line, with what was seen of it if it was rehearsed."""
    return PlanOutlook(
        plan=brief(candidate.counts),
        gpus=candidate.gpus,
        headroom=candidate.headroom,
        lateness=candidate.lateness,
        goodput_share=outcome.whole.goodput_share if outcome else None,
        e2e_s_p99=outcome.whole.e2e_s.p99 if outcome else None,
        price_per_hour=candidate.price,
        why=why,
    )


def _seconds(judge: Judge) -> float:
    least, most = SECONDS
    return min(most, max(least, REQUESTS / float(judge.table.demand.sum())))


def _distinct(found: Iterable[Candidate], *, elastic: bool) -> list[Candidate]:
    """The least late of each plan, the most promising first."""
    best: dict[frozenset[object], Candidate] = {}
    for candidate in found:
        key = frozenset[object](candidate.counts.items())
        best[key] = min(best.get(key, candidate), candidate, key=lambda each: each.lateness)
    if elastic:
        return sorted(best.values(), key=lambda each: (max(1.0, each.lateness), each.price))
    return sorted(best.values(), key=lambda each: each.lateness)


def _uniform(candidate: Candidate) -> bool:
    """Whether each model has one shape on each pool."""
    groups = [(column.model_id, column.pool) for column in candidate.counts]
    return len(groups) == len(set(groups))


def _ranked(played: Sequence[Played], *, elastic: bool) -> list[Played]:
    """The best first, then the best of the rest, and so on."""
    rest, ranked = list(played), list[Played]()
    while rest:
        best = _best(rest, elastic=elastic)
        ranked.append(best)
        rest = [each for each in rest if each is not best]
    return ranked


def _best(played: Sequence[Played], *, elastic: bool) -> Played:
    most = max(each.goodput_share for each in played)
    close = [each for each in played if each.goodput_share >= most - GOODPUT_TIE]
    if elastic:
        cheapest = min(each.candidate.price for each in close)
        close = [each for each in close if each.candidate.price <= cheapest * (1 + PRICE_TIE)]
    least = min(each.e2e_s_p99 for each in close)
    close = [each for each in close if each.e2e_s_p99 <= least * (1 + P99_TIE)]
    return max(close, key=lambda each: (each.candidate.headroom, -each.e2e_s_p99))


def _lost_by(loser: Played, winner: Played, *, elastic: bool) -> str:
    """In words: the first criterion by which it is worse."""
    ours, theirs = loser.candidate, winner.candidate
    if loser.goodput_share < winner.goodput_share - GOODPUT_TIE:
        return f"goodput {loser.goodput_share:.3g} against {winner.goodput_share:.3g}"
    if elastic and ours.price > theirs.price * (1 + PRICE_TIE):
        return f"costs {ours.price:.3g} per hour against {theirs.price:.3g}"
    if loser.e2e_s_p99 > winner.e2e_s_p99 * (1 + P99_TIE):
        return f"P99 of E2E {loser.e2e_s_p99:.3g} s against {winner.e2e_s_p99:.3g} s"
    if ours.headroom < theirs.headroom:
        return (
            f"as good, but carries {ours.headroom:.3g} times the demand, not {theirs.headroom:.3g}"
        )
    return "as good"
