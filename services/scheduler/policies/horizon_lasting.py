"""How long a plan may be expected to last: as long as demand stayed near what it was.

A gain is worth its rate times the time for which the demand that promises it goes on. So demand is
compared with that of a reference moment; once it has moved away, the time that it stayed is one
observation, and a new reference is taken. The expected time is the moving average of these, and
never less than the present demand has stayed already: what has lasted may go on.

Two demands are as far apart as the parts of them that are not common to both,

    sum_k |a[k] - b[k]| / sum_k (a[k] + b[k])

over types k, in requests/s, in prompt tokens/s and in output tokens/s, whichever is largest: for
equal totals this is the total variation distance of the two mixes, and it sees a change of level or
of lengths as well.
"""

from collections.abc import Mapping
from math import pi, sqrt

from services.scheduler.policies.horizon import Line

LASTS_S = 300.0  # what a plan is expected to last at first: HexGen-3's stability window
LASTS_S_MIN, LASTS_S_MAX = 60.0, 3600.0
NEAR = 0.2  # demands this near are the same: plans for them hardly differ
RATE = 0.3  # weight of the newest observation: a step that takes two periods counts as two
NOISE = 2.0  # times what chance alone puts between two samples of one demand

Demand = Mapping[tuple[str, int], Line]


class Lasting:
    """``now`` is told of each decision's demand, in order of time."""

    def __init__(self, lasts_s: float = LASTS_S) -> None:
        self._mean_s = min(max(lasts_s, LASTS_S_MIN), LASTS_S_MAX)
        self._since_s: float | None = None
        self._reference: Demand = {}

    def now(self, demand: Demand, now_s: float, *, horizon_s: float) -> float:
        """Seconds for which a plan made for ``demand`` is expected to last."""
        if self._since_s is None:
            self._since_s, self._reference = now_s, demand
        stayed_s = now_s - self._since_s
        if not near(self._reference, demand, horizon_s=horizon_s):
            lasted_s = min(max(stayed_s, LASTS_S_MIN), LASTS_S_MAX)
            self._mean_s += RATE * (lasted_s - self._mean_s)
            self._since_s, self._reference = now_s, demand
            stayed_s = 0.0
        return min(max(self._mean_s, stayed_s, LASTS_S_MIN), LASTS_S_MAX)


def near(one: Demand, other: Demand, *, horizon_s: float) -> bool:
    """Whether two demands, each known by what arrives in ``horizon_s``, may count as the same."""
    arrivals = sum(line.rps for line in other.values())
    if arrivals <= 0.0 or horizon_s <= 0.0:
        return apart(one, other) <= NEAR
    chance = sum(sqrt(line.rps / (pi * horizon_s)) for line in other.values()) / arrivals
    return apart(one, other) <= NEAR + NOISE * chance


def apart(one: Demand, other: Demand) -> float:
    """0 for equal demands to 1 for those that have nothing in common. What waits does not count: it
    is no demand that lasts."""
    pairs = [(_flows(one.get(key)), _flows(other.get(key))) for key in one.keys() | other.keys()]
    farthest = 0.0
    for part in range(3):
        between = sum(abs(a[part] - b[part]) for a, b in pairs)
        total = sum(a[part] + b[part] for a, b in pairs)
        farthest = max(farthest, between / total if total > 0.0 else 0.0)
    return farthest


def _flows(line: Line | None) -> tuple[float, float, float]:
    """Requests/s, prompt tokens/s, output tokens/s."""
    if line is None:
        return 0.0, 0.0, 0.0
    rps = line.rps - line.waiting_rps
    return rps, rps * line.kind.input_tokens_mean, rps * line.kind.output_tokens_mean
