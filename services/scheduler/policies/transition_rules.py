"""When replicas move: each rule by its name, in the order in which they are asked.

same     the best plan found is the one in force
gain     what it brings must exceed the error of its prediction, ``GAIN_MIN``; on a way begun, less
room     replicas that cannot carry the demand are left for ones that carry more by ``GAIN_MIN``
         only, and none are left for ones that carry less, unless these carry ``ROOM`` times it
lacking  or it has what the operator asks of any plan, and the one in force has not
saving   or it saves ``SAVING_MIN`` of the price, where GPUs may be left unused: it must be on time
         by ``MARGIN``, so that it is not left at the next rise, and last for as long as it takes to
         start again what it lets go
held     replicas that were chosen for this demand stay, unless they cannot carry it
way      there must be a way that is affordable (``transition_verdict``)
"""

from collections import Counter
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.joint_choice import Candidate
from services.scheduler.policies.transition_running import running
from services.scheduler.policies.transition_verdict import Move, Way, affordable_way
from shared.messages.decisions import SwitchOutlook

GAIN_MIN = 0.1  # of lateness: well within the error of its prediction
GAIN_MIN_ON_THE_WAY = 0.05
ROOM = 1.6  # times the demand: bursts of half a minute reach that
SAVING_MIN = 0.05  # of the price
ON_TIME = 1.0  # lateness at which 99 % meet their targets
MARGIN = 0.8  # of it, that a cheaper plan may use up


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``way``: what to go, None to stay; ``why`` in words, ``switch`` in figures. ``unreachable``:
    it gains enough, but has too little room, or no affordable way leads there: another plan may do
    better."""

    why: str
    way: Way | None = None
    switch: SwitchOutlook | None = None
    unreachable: bool = False

    @property
    def moves(self) -> bool:
        return self.way is not None


def ruled(move: Move, *, held: str = "", lacking: str = "") -> Verdict:
    """``held``: why replicas were to be held, as far as demand and GPUs tell; ``lacking``: what the
    operator asks for and those in force have not."""
    kept, choice = move.kept, move.choice
    if Counter(choice.counts) == Counter(kept.counts):
        return Verdict(why=words("the replicas in force are the best", kept))
    compared = f"{words('in force', kept)}; {words('best', choice)}"
    saving = move.judge.problem.needs.elastic and kept.lateness <= ON_TIME
    refused = _too_little_saved(move) if saving else _too_little_gained(move)
    if lacking:
        refused, compared = "", f"{lacking}; {compared}"
    elif not refused and held and not move.done:
        carried = move.judge.usual_headroom(kept.counts)
        refused = f"held: {held}" if carried >= 1.0 else ""
    requests = running(move.judge, kept, move.before)
    move = replace(move, running=requests, must_pay=not (saving or lacking))
    way = affordable_way(move)
    if not refused and saving and not lacking:
        refused = _gone_too_soon(move, way)
    crowded = "" if refused or saving or lacking else _too_little_room(move)
    unreachable = not refused and bool(crowded or way.refused)
    refused = refused or crowded or way.refused
    outlook = way.outlook(move, refused, moves=not refused)
    sums = _sums(outlook)
    if saving:
        sums = f"saves {kept.price - choice.price:.3g} per hour, {sums}"
    why = f"{compared}: {sums}"
    if refused:
        said = f"{compared}: {refused}; {sums}"
        return Verdict(why=said, switch=outlook, unreachable=unreachable)
    return Verdict(why=why, way=way, switch=outlook)


def words(what: str, candidate: Candidate) -> str:
    """A plan and its figures."""
    return (
        f"{what} ({brief(candidate.counts)}) serves {candidate.headroom:.3g} times the demand, "
        f"lateness {candidate.lateness:.3g}"
    )


def _too_little_gained(move: Move) -> str:
    least = GAIN_MIN_ON_THE_WAY if move.done else GAIN_MIN
    gain = move.kept.lateness - move.choice.lateness
    return "" if gain > least * move.kept.lateness else f"a gain below {least:.0%} is no reason"


def _too_little_room(move: Move) -> str:
    least = GAIN_MIN_ON_THE_WAY if move.done else GAIN_MIN
    now, then = move.kept.headroom, move.choice.headroom
    if now < 1.0 and then < now * (1.0 + least):
        return "what overloads the replicas in force would overload these as well"
    if then < min(now, ROOM):
        return f"it carries less than those in force, and not {ROOM:g} times the demand"
    return ""


def _too_little_saved(move: Move) -> str:
    kept, choice = move.kept, move.choice
    if choice.price > (1.0 - SAVING_MIN) * kept.price:
        return f"on time already, and a saving below {SAVING_MIN:.0%} is no reason"
    if choice.lateness > MARGIN * ON_TIME:
        return f"on time already, and the cheaper plan would be so by less than {1 - MARGIN:.0%}"
    return ""


def _gone_too_soon(move: Move, way: Way) -> str:
    judge = move.judge
    back_s = max(judge.start_s(column) for column in move.kept.counts)
    if move.lasts_s > way.seconds + back_s:
        return ""
    return (
        f"what it saves in {move.lasts_s:.0f} s is spent on {way.seconds:.0f} s of switching and "
        f"{back_s:.0f} s of starting again"
    )


def _sums(outlook: SwitchOutlook) -> str:
    """Gain, cost and payback in words."""
    pays = "never pays back"
    if outlook.payback_s is not None:
        pays = f"pays back after {outlook.payback_s:.0f} s of {outlook.horizon_s:.0f}"
    step = f"{outlook.step}, " if outlook.step else ""
    pause = "" if outlook.pause_s is None else f" live, {outlook.pause_s:.2f} s of it in a pause"
    return (
        f"{step}{outlook.seconds:.0f} s of switching{pause}, gain {outlook.gain:.3g} and cost "
        f"{outlook.cost:.3g} in seconds of lateness, {pays}"
    )
