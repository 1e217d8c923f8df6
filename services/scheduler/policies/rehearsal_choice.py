"""The best few plans, played through: which of them to take, and what the others lost by.

    ranking = rehearsed(judge, found)            # found: candidates(...) of joint_choice
    ranking.best, ranking.outcome                # the Candidate to take, and how it fared
    ranking.alternatives                         # PlanOutlook of the others, the next best first
    ranking.of(candidate)                        # how one fared that was rehearsed, else None

Of plans with the same replicas the least late dispatch is kept, of all plans the ``keep`` least
late, and with them the least late uniform one, the one and the uniform one of most headroom, and
those that are given as ``always``. All are rehearsed with the same requests: the last minutes'
arrivals (``history``) at their level, and at ``STRESS`` times that, since a plan that is best at
what was foreseen and founders beyond is no good one. They are ranked by

    1. headroom: within ``ROOM_TIE`` of the most (``UNIFORM_TIE`` for uniform plans), or ``PLENTY``
       times the demand, is as good as the most. Bursts that nobody foresaw are what requests are
       late in, and what is gained by being faster in calm is lost there many times over
    2. worth (``rehearsal_outcome.worth``), the geometric mean over both; within ``TIE`` of the best
       is a tie, and a plan of unlike replicas must be better than the best uniform one by
       ``MIXED_GAIN``
    3. headroom once more

and where GPUs may be left unused ("elastic"), at the expected level alone, by goodput (within
``GOODPUT_TIE`` of the best is a tie), then price, then worth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.history import Pattern, pattern_of
from services.scheduler.policies.joint_judge import Candidate, Judge
from services.scheduler.policies.rehearsal import Drawn, Rehearsed, Scene, rehearse, requests
from services.scheduler.policies.rehearsal_outcome import worth
from shared.messages.decisions import ALTERNATIVES_MAX, PlanOutlook

KEEP = 6
SECONDS = (60.0, 300.0)  # of a rehearsal, at least and at most
REQUESTS = 1500.0  # that are to come in that time: less, and the slowest 1 % are but a few
PAST_REQUESTS_MAX = 3000.0  # of the past that is played again
STRESS = 1.25  # times what is expected, bursts and all: forecasts are wrong by that much
GOODPUT_TIE = 0.01
TIE = 0.03  # relative, of worth
MIXED_GAIN = 0.3  # likewise: unlike replicas forgive less when requests are not what types say
ROOM_TIE, UNIFORM_TIE = 0.05, 0.2  # relative, of headroom
PLENTY = 4.0  # times the demand: more room is not needed in any burst
SEED = 1
PRICE_TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A plan, and how it fared at each level."""

    candidate: Candidate
    outcomes: tuple[Rehearsed, ...]

    @property
    def outcome(self) -> Rehearsed:
        """At the expected level."""
        return self.outcomes[0]

    @property
    def worth(self) -> float:
        """Geometric mean over the levels."""
        values = [worth(outcome.whole) for outcome in self.outcomes]
        return prod(values) ** (1.0 / len(values))

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

    def of(self, candidate: Candidate) -> Played | None:
        return next((each for each in self.played if each.candidate is candidate), None)


def rehearsed(  # noqa: PLR0913  # how much, how long, with what
    judge: Judge,
    found: Sequence[Candidate],
    *,
    keep: int = KEEP,
    seconds: float | None = None,
    seed: int = SEED,
    drawn: Sequence[Drawn] = (),
    always: Sequence[Candidate] = (),
    elastic: bool = False,
) -> Ranking:
    """The ranking of ``found``, of which there is at least one, and ``always``. ``drawn``: the
    requests of each level, the expected first; without any: what the judge's table expects, as a
    steady rate, for ``seconds`` or as long as it takes for ``REQUESTS`` of them to come."""
    drawn = drawn or (requests(judge.table, seconds=seconds or _seconds(judge), seed=seed),)
    scene = scene_of(judge)
    distinct = _distinct(found, elastic=elastic)
    kept = distinct[:keep]
    kept += [each for each in distinct[keep:] if _uniform(each)][:1]
    for group in (distinct, [each for each in distinct if _uniform(each)]):
        roomiest = max(group, key=lambda each: each.headroom, default=None)
        if roomiest is not None and not any(each is roomiest for each in kept):
            kept.append(roomiest)
    kept += [each for each in always if not any(each is other for other in kept)]
    played = [
        Played(
            candidate=each,
            outcomes=tuple(rehearse(scene, each.counts, each.shares, level) for level in drawn),
        )
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


def past_of(judge: Judge, *, horizon_s: float, seed: int = SEED) -> tuple[Drawn, Drawn]:
    """The last minutes' arrivals of the judge's types, at the expected level and at ``STRESS``
    times that."""
    pattern = pattern_of(judge.table.types, judge.problem.history, horizon_s=horizon_s)
    pattern = pattern.newest(PAST_REQUESTS_MAX)
    high = Pattern(seconds=pattern.seconds, rates=STRESS * pattern.rates)
    seconds = pattern.length_s
    return (
        requests(judge.table, seconds=seconds, seed=seed, pattern=pattern),
        requests(judge.table, seconds=seconds, seed=seed, pattern=high),
    )


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
    close = list(played)
    if elastic:
        most = max(each.goodput_share for each in played)
        close = [each for each in played if each.goodput_share >= most - GOODPUT_TIE]
        cheapest = min(each.candidate.price for each in close)
        close = [each for each in close if each.candidate.price <= cheapest * (1 + PRICE_TIE)]
    close = _roomy(close) if not elastic else close
    best = max(each.worth for each in close)
    uniform = [each for each in close if _uniform(each.candidate)]
    even = max((each.worth for each in uniform), default=0.0)
    if uniform and even >= best * (1 - MIXED_GAIN):  # where nothing is worth anything, too
        close, best = uniform, even
    close = [each for each in close if each.worth >= best * (1 - TIE)]
    return max(close, key=lambda each: (each.candidate.headroom, each.worth))


def _roomy(played: Sequence[Played]) -> list[Played]:
    """Those that carry about as much as any, or plenty. Unlike replicas carry what they do by
    routers that tell types apart, which they cannot always: uniform ones need less."""
    most = max(each.candidate.headroom for each in played)

    def enough(each: Played) -> float:
        return min(PLENTY, (1 - (UNIFORM_TIE if _uniform(each.candidate) else ROOM_TIE)) * most)

    return [each for each in played if each.candidate.headroom >= enough(each)]


def _lost_by(loser: Played, winner: Played, *, elastic: bool) -> str:
    """In words: what it is worse in."""
    ours, theirs = loser.candidate, winner.candidate
    found: list[str] = []
    if loser.goodput_share < winner.goodput_share - GOODPUT_TIE:
        found.append(f"goodput {loser.goodput_share:.3g} against {winner.goodput_share:.3g}")
    if elastic and ours.price > theirs.price * (1 + PRICE_TIE):
        found.append(f"costs {ours.price:.3g} per hour against {theirs.price:.3g}")
    if loser.e2e_s_p99 > winner.e2e_s_p99 * (1 + TIE):
        found.append(f"P99 of E2E {loser.e2e_s_p99:.3g} s against {winner.e2e_s_p99:.3g} s")
    if loser.worth < winner.worth * (1 - TIE) and not found and len(loser.outcomes) > 1:
        loses, wins = (each.outcomes[-1].whole for each in (loser, winner))
        found.append(
            f"at {STRESS:g} times the demand goodput {loses.goodput_share or 0.0:.3g} and P99 of "
            f"E2E {loses.e2e_s.p99 or 0.0:.3g} s against {wins.goodput_share or 0.0:.3g} and "
            f"{wins.e2e_s.p99 or 0.0:.3g} s"
        )
    if not elastic and ours.headroom < min(PLENTY, (1 - ROOM_TIE) * theirs.headroom):
        found.append(f"carries {ours.headroom:.3g} times the demand, not {theirs.headroom:.3g}")
    if not found and ours.headroom < theirs.headroom:
        return (
            f"as good, but carries {ours.headroom:.3g} times the demand, not {theirs.headroom:.3g}"
        )
    return "; ".join(found) or "as good"
