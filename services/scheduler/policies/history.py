"""Arrivals as they really come: the last minutes' bursts at the level that is expected.

Plans live or die in bursts of half a minute, during which more arrives than any plan can serve; a
rate that stays the same for minutes, however exactly foreseen, says nothing of them. So plans are
rehearsed with the settled windows of the last minutes: each type rises and falls as it did, about

    level    its mean over these windows, unless what is expected lies outside of what they make
             plausible: more than ``SHIFT_Z`` standard deviations of a mean over the horizon away.
             Then it has shifted, and its level is what is expected.

A type without a past, and a mesh without one, are taken to burst as ``BURSTS`` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from services.scheduler.policies.capacity_types import TypeDemand
from services.scheduler.policies.flow import Array
from services.scheduler.policies.interface import PastWindow

SHIFT_Z = 3.0
WINDOWS_MIN = 18  # fewer are no past to go by: a burst or two would be missing
BURSTS = (1.0, 1.0, 0.7, 1.0, 1.6, 0.7)
"""Of a rate, in parts of ``BURST_S``: mean 1. Chat and code of Azure 2023 together exceed 1.6 times
their mean in one of nine half minutes."""
BURST_S = 30.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pattern:
    """Requests/s [W, J] of each type in windows of ``seconds`` [W]."""

    seconds: Array
    rates: Array

    @property
    def length_s(self) -> float:
        return float(self.seconds.sum())

    @property
    def means(self) -> Array:
        """Requests/s [J]."""
        return np.average(self.rates, axis=0, weights=self.seconds)

    def newest(self, requests_max: float) -> "Pattern":
        """Its last windows, as many as hold ``requests_max`` requests at most; at least one."""
        expected = (self.rates.sum(axis=1) * self.seconds)[::-1].cumsum()
        kept = max(1, int((expected <= requests_max).sum()))
        return Pattern(seconds=self.seconds[-kept:], rates=self.rates[-kept:])


def pattern_of(
    types: Sequence[TypeDemand],
    past: Mapping[str, tuple[PastWindow, ...]],
    *,
    horizon_s: float,
    follow: bool = True,
) -> Pattern:
    """What to rehearse with for ``types``, by the ``past`` of each model. Windows of unlike models
    count from the newest back, as far as all models that have a past have them. ``follow``: types
    whose level has shifted are taken at the new one; else the past is played as it was."""
    longest = [windows for windows in past.values() if len(windows) >= WINDOWS_MIN]
    if not longest:
        seconds = np.full(len(BURSTS), BURST_S)
        rates = np.array([[kind.arrivals_rps for kind in types]]) * np.array(BURSTS)[:, None]
        return Pattern(seconds=seconds, rates=rates)
    count = min(len(windows) for windows in longest)
    seconds = np.array([window.seconds for window in longest[0][-count:]])
    rates = np.stack(
        [
            _of_type(kind, past.get(kind.model_id, ()), seconds, horizon_s, follow=follow)
            for kind in types
        ],
        axis=1,
    )
    return Pattern(seconds=seconds, rates=rates)


def _of_type(
    kind: TypeDemand,
    past: Sequence[PastWindow],
    seconds: Array,
    horizon_s: float,
    *,
    follow: bool,
) -> Array:
    """Requests/s of one type in each window."""
    count = len(seconds)
    seen = [window.arrivals_rps.get(_number(kind), 0.0) for window in past[-count:]]
    if len(past) < count or sum(seen) <= 0.0:
        upto = np.cumsum(seconds) - seconds / 2
        places = (upto / BURST_S).astype(int) % len(BURSTS)
        return kind.arrivals_rps * np.array(BURSTS)[places]
    rates = np.array(seen)
    if not follow:
        return rates
    mean = float(np.average(rates, weights=seconds))
    # A mean over the horizon varies as windows do, and by chance, whichever is more.
    windows = max(1.0, horizon_s / float(seconds.mean()))
    varies = sqrt(max(float(rates.var()) / windows, mean / max(horizon_s, 1.0)))
    shifted = abs(kind.arrivals_rps - mean) > SHIFT_Z * varies
    return rates * (kind.arrivals_rps / mean if shifted else 1.0)


def _number(kind: TypeDemand) -> int:
    """Of its type; types by another name have no past."""
    return int(kind.name) if kind.name.isdecimal() else -1
