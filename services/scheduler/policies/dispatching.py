"""The best way to send types to given replicas: tried out in a rehearsal, bursts and all.

All types together, and longer prompts apart in every way that ``separation.py`` offers, one model
after the other. All are rehearsed with the same requests and ranked by their worth
(``rehearsal_outcome.worth``): keeping types apart may bring a few more requests in time at the
price of one type that waits forever. What is worth hardly more than what is listed before it is a
tie, and types together are listed first. To save
time all splits are tried one way and with the part of the requests in which most tokens come, and
only the best few in all ways and with all requests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.scheduler.policies.capacity import Column
from services.scheduler.policies.joint_judge import Judge
from services.scheduler.policies.rehearsal import Drawn, Rehearsed, Scene, rehearse
from services.scheduler.policies.rehearsal_outcome import worth
from services.scheduler.policies.separation import Dispatch, apart, together

TIE = 0.03  # relative, of worth
SCREENED_MAX = 1500  # requests of the busiest part, with which all are tried
FINALISTS = 2
GOOD = 0.95  # of requests in time: what is as good as that is left alone
GAIN_MIN = 0.15  # of worth: who goes where does not change for less


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tried:
    """A dispatch, and how its requests fared at each level of demand."""

    dispatch: Dispatch
    outcomes: tuple[Rehearsed, ...]

    @property
    def worth(self) -> float:
        """At the expected level."""
        return worth(self.outcomes[0].whole)

    def beats(self, other: "Tried") -> bool:
        """Whether it is worth more by ``GAIN_MIN`` at the expected level, and no less at any."""
        others = [worth(outcome.whole) for outcome in other.outcomes]
        own = [worth(outcome.whole) for outcome in self.outcomes]
        no_less = all(mine >= theirs for mine, theirs in zip(own, others, strict=True))
        return no_less and own[0] > others[0] * (1.0 + GAIN_MIN)


def best_dispatch(
    judge: Judge,
    scene: Scene,
    counts: Mapping[Column, int],
    drawn: Sequence[Drawn],
    *,
    standing: Dispatch | None = None,
    separate: bool = True,
) -> Dispatch:
    """The best dispatch of ``counts``; ``scene`` and ``drawn``, the requests of each level, are
    those of ``judge.table``. ``standing``: how types are sent now, if these replicas are in force:
    it is left for one that beats it only. ``separate``: whether types may be kept apart at all;
    they are not where ``GOOD`` of the requests are in time without."""
    busiest = [busiest_part(drawn[0], SCREENED_MAX)]
    best = together(judge.table, counts)
    (now,) = _tried(scene, [standing or best], drawn[:1])
    needless = (now.outcomes[0].whole.goodput_share or 0.0) >= GOOD
    if standing is not None and needless:
        return standing
    separate = separate and not needless
    models = {column.model_id for column, count in counts.items() if count > 0 and separate}
    for model_id in sorted(models):
        splits = {id(split.one_way): split for split in apart(best, model_id)}
        if splits:
            screened = ranked(_tried(scene, [s.one_way for s in splits.values()], busiest))
            finalists = [best]
            for each in screened[:FINALISTS]:
                split = splits[id(each.dispatch)]
                finalists += [split.one_way, split.strict, split.both_ways]
            best = ranked(_tried(scene, finalists, drawn))[0].dispatch
    if standing is None:
        return best
    now, then = _tried(scene, [standing, best], drawn)
    return best if then.beats(now) else standing


def ranked(tried: Iterable[Tried]) -> list[Tried]:
    """The best first: of those within ``TIE`` of the most worth, the one listed first; then the
    best of the rest, and so on."""
    rest: list[Tried] = list(tried)
    found: list[Tried] = []
    while rest:
        most = max(each.worth for each in rest)
        best = next(each for each in rest if each.worth >= most * (1.0 - TIE))
        found.append(best)
        rest = [each for each in rest if each is not best]
    return found


def busiest_part(drawn: Drawn, most: int) -> Drawn:
    """At most ``most`` requests in a row, those with the most tokens; all of them count."""
    if len(drawn) <= most:
        return drawn
    tokens = np.cumsum(np.concatenate([[0], drawn.input_tokens + drawn.output_tokens]))
    starts_s = drawn.at_s[: len(drawn) - most + 1]
    lasts_s = np.maximum(drawn.at_s[most - 1 :] - starts_s, 1e-9)
    start = int(((tokens[most:] - tokens[:-most])[: len(lasts_s)] / lasts_s).argmax())
    rows = slice(start, start + most)
    begin_s = float(drawn.at_s[start])
    return replace(
        drawn,
        seconds=float(drawn.at_s[start + most - 1]) - begin_s,
        warm_s=0.0,
        at_s=drawn.at_s[rows] - begin_s,
        kinds=drawn.kinds[rows],
        taken_for=drawn.taken_for[rows],
        input_tokens=drawn.input_tokens[rows],
        output_tokens=drawn.output_tokens[rows],
        lots=drawn.lots[rows],
    )


def _tried(scene: Scene, options: Sequence[Dispatch], drawn: Sequence[Drawn]) -> list[Tried]:
    found: list[Tried] = []
    for option in options:
        own = replace(scene, table=option.table)
        outcomes = [rehearse(own, option.counts, option.shares, level) for level in drawn]
        found.append(Tried(dispatch=option, outcomes=tuple(outcomes)))
    return found
