"""What was seen in a rehearsal, as figures: means, percentiles and shares, by weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.flow import Array
from services.scheduler.policies.rehearsal_replica import Log
from shared.slo import SloTarget

GOODPUT_NIL = 0.02  # a share of requests in time that is none to speak of

Goals = Sequence[Sequence[tuple[float, SloTarget]]]
"""By type, targets and the share of its requests that has each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds; None where there was nothing to see."""

    mean: float | None = None
    p50: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fared:
    """How a type's requests fared, or a column's. ``goodput_share``: of them that meet both
    targets; None if there were none."""

    requests: int
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    goodput_share: float | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Seen:
    """Rows of requests. ``homes``: numbers of what served them; ``weights``: how many each stands
    for; ``tpot_s`` is NaN where there is none; those not ``ended`` have the times of the bound."""

    at_s: Array
    kinds: npt.NDArray[np.intp]
    homes: npt.NDArray[np.intp]
    weights: Array
    ttft_s: Array
    tpot_s: Array
    e2e_s: Array
    ended: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        log: Log,
        kinds: npt.NDArray[np.intp],
        homes: npt.NDArray[np.intp],
        *,
        weights: Array,
        bound_s: float,
    ) -> "Seen":
        at_s, first_s, ended_s = np.array(log.at_s), np.array(log.first_s), np.array(log.ended_s)
        gaps = np.array(log.output_tokens, np.float64) - 1.0
        ended = ~np.isnan(ended_s)
        ended_s = np.where(ended, ended_s, np.maximum(bound_s, at_s))
        decoded_s = ended_s - first_s  # NaN without a first token
        tpot_s = np.divide(decoded_s, gaps, out=np.full_like(gaps, np.nan), where=gaps > 0)
        return cls(
            at_s=at_s,
            kinds=kinds,
            homes=homes,
            weights=weights,
            ttft_s=np.where(np.isnan(first_s), ended_s, first_s) - at_s,
            tpot_s=tpot_s,
            e2e_s=ended_s - at_s,
            ended=ended,
        )

    def only(self, rows: npt.NDArray[np.bool_]) -> "Seen":
        return Seen(
            at_s=self.at_s[rows],
            kinds=self.kinds[rows],
            homes=self.homes[rows],
            weights=self.weights[rows],
            ttft_s=self.ttft_s[rows],
            tpot_s=self.tpot_s[rows],
            e2e_s=self.e2e_s[rows],
            ended=self.ended[rows],
        )

    def goodput_share(self, goals: Goals) -> float | None:
        if not len(self.at_s):
            return None
        good = np.zeros(len(self.at_s))
        for j, aims in enumerate(goals):
            own = (self.kinds == j) & self.ended
            for share, target in aims:
                slow = (self.ttft_s > target.ttft_s) | (self.tpot_s > target.tpot_s)
                good += np.where(own & ~slow, share, 0.0)
        return float(np.average(good, weights=self.weights))


def worth(whole: Fared) -> float:
    """Requests in time per second of tail: ``(goodput share + GOODPUT_NIL) / P99 of E2E``. Neither
    is bought with more than its part of the other: a few more requests in time may cost those of
    one type that wait forever. Without requests, nothing."""
    if whole.goodput_share is None or not whole.e2e_s.p99:
        return 0.0
    return (whole.goodput_share + GOODPUT_NIL) / whole.e2e_s.p99


def fared(seen: Seen, goals: Goals) -> Fared:
    return Fared(
        requests=len(seen.at_s),
        ttft_s=spread(seen.ttft_s, seen.weights),
        tpot_s=spread(seen.tpot_s, seen.weights),
        e2e_s=spread(seen.e2e_s, seen.weights),
        goodput_share=seen.goodput_share(goals),
    )


def spread(values: Array, weights: Array) -> Spread:
    """Of the numbers among ``values``."""
    there = ~np.isnan(values)
    values, weights = values[there], weights[there]
    if not len(values):
        return Spread()
    order = np.argsort(values, kind="stable")
    # Each value is at the middle of its weight; between two, linear.
    upto = np.cumsum(weights[order]) - weights[order] / 2
    p50, p99 = np.interp((0.5, 0.99), upto / weights.sum(), values[order])
    return Spread(mean=float(np.average(values, weights=weights)), p50=float(p50), p99=float(p99))
