"""Saturation: the largest load that the best static deployment bears.

A deployment *keeps up* with a rate scale if requests with 99 % of the offered tokens have ended by
a grace after the last arrival: 5 % of the window, and the P99 of E2E that this deployment has at a
light load (``LIGHT_REQUESTS`` requests in the window), which is what the last requests take in any
case. So a queue may build up in a busy stretch, but must be worked off by the end. Saturation is
the largest rate scale with which some static deployment keeps up, found by steps from what a fluid
model expects, doubled as they miss, and by bisection to ``TOLERANCE``; it does not depend on SLO
targets. Load 1.0 is saturation.
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from loadgen.compare.jobs import Job, Runs
from loadgen.compare.workload import Workload, typed_windows
from shared.errors import OServeError

GRACE_SHARE = 0.05
LIGHT_REQUESTS = 100
TOLERANCE = 0.02
DOUBLINGS_MAX = 16
FIRST_STEP = 1.25  # from an estimate; squared until it is a doubling


class SaturationNotFound(OServeError):
    """Every rate is borne, or none: says which, and at what scale the search gave up."""


class Saturation(msgspec.Struct, frozen=True, kw_only=True):
    """``rate_scale`` is borne by ``deployment``, ``rate_scale_above`` by none. ``simulated_s``: how
    long each simulation's arrivals lasted, from ``from_s`` of the window on."""

    rate_scale: float
    rate_scale_above: float
    deployment: str
    requests_per_s: float
    simulated_s: float
    from_s: float
    simulations: int
    given: bool = False  # by the caller, not searched for


KeepsUp = Callable[[float], str | None]
"""Which deployment keeps up with a rate scale; None if none does."""


def bisect_scale(
    keeps_up: KeepsUp,
    *,
    start: float = 1.0,
    first_step: float = 2.0,
    tolerance: float = TOLERANCE,
) -> tuple[float, float, str]:
    """The largest scale borne, the smallest that is not, no further apart than ``tolerance`` of
    the former, and who bears it. ``start`` is looked at first, then what is ``first_step`` times as
    much or as little, and so on in larger steps. Raises SaturationNotFound after ``DOUBLINGS_MAX``
    of them."""
    low, high, name = start, start, keeps_up(start)
    step = first_step
    for _ in range(DOUBLINGS_MAX):
        if name is None:
            high, low = low, low / step
            name = keeps_up(low)
        elif high == low:
            above = keeps_up(low * step)
            if above is None:
                high = low * step
                break
            low = high = low * step
            name = above
        else:
            break
        step = min(2.0, step * step)
    if name is None:
        raise SaturationNotFound(
            f"no static deployment keeps up even at rate scale {low:g}; does the model's KV "
            "cache hold the trace's longest request?"
        )
    if high == low:
        raise SaturationNotFound(
            f"{name} still keeps up at rate scale {low:g}; choose a longer window"
        )
    while high - low > tolerance * low:
        middle = math.sqrt(low * high)
        bearer = keeps_up(middle)
        if bearer is None:
            high = middle
        else:
            low, name = middle, bearer
    return low, high, name


class Bearers:
    """Answers ``KeepsUp`` by simulation. A deployment that failed a scale is not asked for a larger
    one, and the one that bore the last is asked first."""

    def __init__(self, runs: Runs, candidates: Sequence[Job]) -> None:
        """``candidates``: one job for each deployment, on the workload of the search."""
        self._runs = runs
        self._order = list(candidates)
        self._failed: dict[str, float] = {}
        self._rest_s: dict[str, float] = {}
        self.simulations = 0

    def keeps_up(self, scale: float) -> str | None:
        left = [job for job in self._order if scale < self._failed.get(job.name, math.inf)]
        while left:
            few, left = left[: self._runs.processes], left[self._runs.processes :]
            self._measure_rest([job for job in few if job.name not in self._rest_s])
            few = [job for job in few if job.name in self._rest_s]
            asked = [
                msgspec.structs.replace(job, rate_scale=scale, drain_s=self._grace_s(job) + 1.0)
                for job in few
            ]
            records = self._runs.all(asked, f"saturation, rate scale {scale:.3g}")
            self.simulations += len(asked)
            for job, record in zip(few, records, strict=True):
                settled_s = record.metrics.settled_s
                if settled_s is not None and settled_s <= self._grace_s(job):
                    self._order.remove(job)
                    self._order.insert(0, job)
                    return job.name
                self._failed[job.name] = min(scale, self._failed.get(job.name, math.inf))
        return None

    def _grace_s(self, job: Job) -> float:
        return GRACE_SHARE * job.workload.window_s + self._rest_s[job.name]

    def _measure_rest(self, jobs: Sequence[Job]) -> None:
        light = [msgspec.structs.replace(job, rate_scale=light_scale(job.workload)) for job in jobs]
        records = self._runs.all(light, "saturation, at rest")
        self.simulations += len(light)
        for job, record in zip(jobs, records, strict=True):
            p99_ms = record.metrics.e2e_ms.p99
            if p99_ms is None:
                self._failed[job.name] = 0.0  # some requests never end on it
            else:
                self._rest_s[job.name] = p99_ms / 1000.0


def light_scale(workload: Workload) -> float:
    """The rate scale that leaves about LIGHT_REQUESTS."""
    return min(1.0, LIGHT_REQUESTS / requests_of(workload))


def requests_of(workload: Workload) -> int:
    return sum(len(typed.records) for typed in typed_windows(workload))
