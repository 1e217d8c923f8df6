"""Two predictors of one type's arrivals, raced against each other.

``last_value``: the next windows will be as the last one. ``ewma``: as an exponentially weighted
mean of all windows. Both are flat, so they answer for any horizon; each forecast is scored when
its horizon has passed, by its distance to the mean of the windows that came. The one with the
smaller mean absolute error over the remembered forecasts speaks.

Around what it says, the quantiles of its own errors so far (``spread``) give a range; never a
narrower one than chance alone does: arrivals of a rate r over a horizon h vary by sqrt(r / h).

A missing window is not an empty one. It is no observation: it enters no mean and scores nothing,
and after a gap of k windows the next one counts for as much as k + 1 would have together.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, quantiles

from services.forecaster.config import ForecasterConfig
from shared.messages.demand import TypeDemand, TypeForecast, TypeTrack

LAST_VALUE, EWMA = "last_value", "ewma"
Z90 = 1.2816  # of a normal distribution
QUANTILES_MIN = 10  # errors from which quantiles are read off; with fewer they are taken as normal
MAE_TO_SD = 1.2533  # of a normal distribution


@dataclass(frozen=True, slots=True)
class Guess:
    """What each predictor said, and in which window."""

    window: int
    last_rps: float
    ewma_rps: float


class Track:
    """One type's history."""

    def __init__(self, config: ForecasterConfig, first: TypeDemand | TypeTrack) -> None:
        self._config = config
        self._window = 0
        self._guesses: deque[Guess] = deque(maxlen=config.horizon_windows)
        self._seen: deque[tuple[int, float]] = deque(maxlen=config.horizon_windows)
        self._last_errors: deque[float] = deque(maxlen=config.errors_max)
        self._ewma_errors: deque[float] = deque(maxlen=config.errors_max)
        self.request_type = first.request_type
        self._input_tokens = first.input_tokens_mean
        self._output_tokens = first.output_tokens_mean
        self._class_shares: dict[str, float] = {}  # of the newest window that had any requests
        if isinstance(first, TypeTrack):
            self._last_rps, self._ewma_rps = first.last_rps, first.ewma_rps
            self._last_errors.extend(first.last_errors)
            self._ewma_errors.extend(first.ewma_errors)
        else:
            self._last_rps = self._ewma_rps = first.arrivals_rps

    def observe(self, demand: TypeDemand, *, missing: int) -> None:
        """Take the next window, ``missing`` windows after the last one taken."""
        self._window += missing + 1
        self._seen.append((self._window, demand.arrivals_rps))
        self._score()
        rate = 1.0 - (1.0 - self._config.ewma_rate) ** (missing + 1)
        self._last_rps = demand.arrivals_rps
        self._ewma_rps += rate * (demand.arrivals_rps - self._ewma_rps)
        if demand.requests > 0:  # an empty window says nothing of lengths
            self._input_tokens += rate * (demand.input_tokens_mean - self._input_tokens)
            self._output_tokens += rate * (demand.output_tokens_mean - self._output_tokens)
            self._class_shares = demand.class_shares
        self._guesses.append(Guess(self._window, self._last_rps, self._ewma_rps))

    def _score(self) -> None:
        """Score the forecasts whose horizon ends by now, if at least half of it was seen."""
        horizon = self._config.horizon_windows
        while self._guesses and self._guesses[0].window + horizon <= self._window:
            guess = self._guesses.popleft()
            first, last = guess.window + 1, guess.window + horizon
            seen = [rps for window, rps in self._seen if first <= window <= last]
            if 2 * len(seen) >= horizon:
                self._last_errors.append(fmean(seen) - guess.last_rps)
                self._ewma_errors.append(fmean(seen) - guess.ewma_rps)

    @property
    def method(self) -> str:
        """The better predictor so far, unless one is set; before the first score the one that
        needs no history."""
        if self._config.method != "race":
            return self._config.method
        if not self._last_errors or _mae(self._last_errors) <= _mae(self._ewma_errors):
            return LAST_VALUE
        return EWMA

    def forecast(self, *, horizon_s: float) -> TypeForecast:
        method = self.method
        errors = self._last_errors if method == LAST_VALUE else self._ewma_errors
        rps = max(0.0, self._last_rps if method == LAST_VALUE else self._ewma_rps)
        below, above = spread(errors, chance_rps=sqrt(rps / horizon_s)) if errors else (None, None)
        return TypeForecast(
            request_type=self.request_type,
            arrivals_rps=rps,
            input_tokens_mean=max(0.0, self._input_tokens),
            output_tokens_mean=max(0.0, self._output_tokens),
            method=method,
            error_rps_mae=_mae(errors) if errors else None,
            arrivals_rps_p10=None if below is None else max(0.0, rps + below),
            arrivals_rps_p90=None if above is None else rps + above,
            class_shares=self._class_shares,
        )

    def stored(self) -> TypeTrack:
        return TypeTrack(
            request_type=self.request_type,
            last_rps=self._last_rps,
            ewma_rps=self._ewma_rps,
            input_tokens_mean=self._input_tokens,
            output_tokens_mean=self._output_tokens,
            last_errors=tuple(self._last_errors),
            ewma_errors=tuple(self._ewma_errors),
        )

    def check(self) -> None:
        assert len(self._last_errors) == len(self._ewma_errors), "predictors scored unequally"
        assert self._last_rps >= 0.0, self._last_rps
        assert self._ewma_rps >= 0.0, self._ewma_rps


def spread(errors: Collection[float], *, chance_rps: float) -> tuple[float, float]:
    """How far below and above a forecast the 10th and 90th percentile of what comes lie, in
    requests/s, by its ``errors`` so far (what came less what was said), of which there is one at
    least. ``chance_rps``: the standard deviation that there is by chance in any case."""
    if len(errors) >= QUANTILES_MIN:
        deciles = quantiles(errors, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    else:
        high = Z90 * MAE_TO_SD * _mae(errors)
        low = -high
    return min(low, -Z90 * chance_rps), max(high, Z90 * chance_rps)


def _mae(errors: Collection[float]) -> float:
    return fmean(abs(error) for error in errors)
