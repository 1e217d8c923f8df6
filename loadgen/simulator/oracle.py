"""A forecaster that knows the trace: what the best possible forecast would be worth.

It answers each demand report, as the forecaster does, with the arrivals that the trace holds for
the report's types over the horizon. A request belongs to the type whose centre is nearest.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loadgen.simulator.source import Arrival
from shared import subjects
from shared.core import Effect, Started
from shared.messages.demand import DemandReport, ForecastReport, TypeDemand, TypeForecast

INPUTS = (subjects.DEMAND_REPORT,)


class Oracle:
    """A core for the world. ``unix_offset_s`` turns the world's time into the reports'."""

    def __init__(
        self, arrivals: Sequence[Arrival], *, horizon_windows: int, unix_offset_s: float
    ) -> None:
        self._horizon_windows, self._unix_offset_s = horizon_windows, unix_offset_s
        self._futures: dict[str, npt.NDArray[np.float64]] = {}
        for model_id in sorted({arrival.model_id for arrival in arrivals}):
            rows = [
                (a.at_s, a.record.input_tokens, a.record.output_tokens)
                for a in arrivals
                if a.model_id == model_id
            ]
            self._futures[model_id] = np.array(rows, dtype=np.float64)

    def step(self, event: DemandReport | Started, now_s: float) -> list[Effect]:
        if isinstance(event, Started):
            return []
        horizon_s = self._horizon_windows * event.window_s
        forecast = ForecastReport(
            model_id=event.model_id,
            made_at_s=now_s + self._unix_offset_s,
            horizon_s=horizon_s,
            types=self._types(event, now_s, horizon_s),
        )
        return [subjects.FORECAST_REPORT.send(forecast)]

    def check(self) -> None:
        """It holds no state."""

    def _types(
        self, report: DemandReport, now_s: float, horizon_s: float
    ) -> tuple[TypeForecast, ...]:
        future = self._futures.get(report.model_id)
        if future is None or not report.types:
            return ()
        first, last = np.searchsorted(future[:, 0], (now_s, now_s + horizon_s))
        lengths = future[first:last, 1:]
        centres = np.log1p(
            [(t.input_tokens_centroid, t.output_tokens_centroid) for t in report.types]
        )
        distances = ((np.log1p(lengths)[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
        nearest = distances.argmin(axis=1)
        return tuple(
            _forecast(demand, lengths[nearest == i], horizon_s)
            for i, demand in enumerate(report.types)
        )


def _forecast(
    demand: TypeDemand, lengths: npt.NDArray[np.float64], horizon_s: float
) -> TypeForecast:
    seen = len(lengths) > 0
    return TypeForecast(
        request_type=demand.request_type,
        arrivals_rps=len(lengths) / horizon_s,
        input_tokens_mean=float(lengths[:, 0].mean()) if seen else demand.input_tokens_mean,
        output_tokens_mean=float(lengths[:, 1].mean()) if seen else demand.output_tokens_mean,
        method="oracle",
        error_rps_mae=0.0,
    )
