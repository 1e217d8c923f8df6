"""Requests by type: what was predicted when a plan was made, beside what the profiler saw since."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deploy.journal import Past
from deploy.why_answers import Figures, TypeCompared
from shared.messages.decisions import TypeOutlook
from shared.messages.demand import DemandReport, TypeDemand


@dataclass(slots=True)
class _Sums:
    """Of one type over all windows; times are weighted by the requests behind them."""

    requests: int = 0
    arrivals: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    ttft_s: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    tpot_s: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def add(self, demand: TypeDemand, window_s: float) -> None:
        self.requests += demand.requests
        self.arrivals += demand.arrivals_rps * window_s
        self.input_tokens += demand.input_tokens_mean * demand.requests
        self.output_tokens += demand.output_tokens_mean * demand.requests
        if demand.ttft_s_mean is not None:
            self.ttft_s.append((demand.ttft_s_mean, demand.requests))
        if demand.tpot_s_mean is not None:
            self.tpot_s.append((demand.tpot_s_mean, demand.requests))

    def figures(self, covered_s: float) -> Figures | None:
        if not self.requests:
            return None
        return Figures(
            arrivals_rps=self.arrivals / covered_s,
            input_tokens=self.input_tokens / self.requests,
            output_tokens=self.output_tokens / self.requests,
            ttft_s_mean=_mean(self.ttft_s),
            tpot_s_mean=_mean(self.tpot_s),
        )


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None


def windows_since(
    demand: Iterable[Past[DemandReport]], since_s: float | None
) -> list[DemandReport]:
    """Windows that began after ``since_s``: one that began before mixes two plans."""
    if since_s is None:
        return []
    return [past.message for past in demand if past.message.window_start_s >= since_s]


def covered_s(windows: Iterable[DemandReport]) -> dict[str, float]:
    """By model, for how long it was seen."""
    lasted_s: dict[str, float] = {}
    for window in windows:
        lasted_s[window.model_id] = lasted_s.get(window.model_id, 0.0) + window.window_s
    return lasted_s


def compared(
    outlooks: Iterable[TypeOutlook], windows: Sequence[DemandReport]
) -> tuple[TypeCompared, ...]:
    """Each type that was expected or seen."""
    sums: dict[tuple[str, str], _Sums] = {}
    lasted_s = covered_s(windows)
    for window in windows:
        for demand in window.types:
            key = window.model_id, str(demand.request_type)
            sums.setdefault(key, _Sums()).add(demand, window.window_s)
    expected = {(outlook.model_id, outlook.request_type): outlook for outlook in outlooks}
    found: list[TypeCompared] = []
    for key in sorted(expected.keys() | {key for key in sums if sums[key].requests}):
        outlook, seen = expected.get(key), sums.get(key)
        found.append(
            TypeCompared(
                model_id=key[0],
                request_type=key[1],
                predicted=_predicted(outlook) if outlook else None,
                seen=seen.figures(lasted_s[key[0]]) if seen else None,
                requests=seen.requests if seen else 0,
                arrivals_rps_p10=outlook.arrivals_rps_p10 if outlook else None,
                arrivals_rps_p90=outlook.arrivals_rps_p90 if outlook else None,
            )
        )
    return tuple(found)


def _predicted(outlook: TypeOutlook) -> Figures:
    return Figures(
        arrivals_rps=outlook.arrivals_rps,
        input_tokens=outlook.input_tokens,
        output_tokens=outlook.output_tokens,
        ttft_s_mean=outlook.ttft_s_mean,
        tpot_s_mean=outlook.tpot_s_mean,
    )
