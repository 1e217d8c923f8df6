"""What the command line of ``oserve compare`` means, checked before anything is simulated."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadgen.simulator.policies import FORECASTS, ForecastName
from shared.errors import ConfigInvalid
from shared.slo import SLO_CLASSES, SloClass

LOADS_MAX = 50
SEEDS_MAX = 1000
JOBS_MAX = 256
WARMUP_SHARE, WARMUP_S_MAX = 0.1, 300.0
RELATIVE = "relative"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what is compared. ``slo``: "class", or how many times the latencies
    at rest. ``forecast``: of policies whose name does not say; None: each policy's own."""

    traces: dict[str, str]  # model id, or "" for the topology's only model: file
    policies: tuple[str, ...]
    loads: tuple[float, ...]
    seeds: int
    reference: str
    start_s: float = 0.0
    duration_s: float | None = None
    warmup_s: float | None = None
    drain_s: float = 600.0
    slo_times: float | None = None
    slo_class: SloClass = "standard"
    forecast: ForecastName | None = None
    saturation_scale: float | None = None
    saturation_s: float = 3600.0
    candidates: int = 12
    slow_work_s: float | None = None

    def checked(self) -> "Options":
        """Self, if every value makes sense; raises ConfigInvalid."""
        if not 1 <= self.seeds <= SEEDS_MAX:
            raise ConfigInvalid(field="seeds", value=self.seeds, remedy=f"use 1 to {SEEDS_MAX}")
        if self.candidates < 1:
            raise ConfigInvalid(field="candidates", value=self.candidates, remedy="use 1 or more")
        if not 0 <= self.start_s < math.inf:
            raise ConfigInvalid(field="start", value=self.start_s, remedy="use 0 or more")
        for field in ("duration_s", "drain_s", "saturation_scale", "saturation_s"):
            value: float | None = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                name = field.removesuffix("_s").removesuffix("_scale")
                raise ConfigInvalid(field=name, value=value, remedy="use a number above 0")
        if len(set(self.policies)) != len(self.policies):
            raise ConfigInvalid(
                field="policies", value=",".join(self.policies), remedy="name each policy once"
            )
        return self

    def warmup_of(self, window_s: float) -> float:
        """Seconds of the window that are not counted; raises ConfigInvalid if it leaves none."""
        if self.warmup_s is None:
            return min(WARMUP_SHARE * window_s, WARMUP_S_MAX)
        if not 0 <= self.warmup_s < window_s:
            raise ConfigInvalid(
                field="warmup",
                value=self.warmup_s,
                remedy=f"use 0 or more and less than the window's {window_s:g} s",
            )
        return self.warmup_s


def parse_loads(text: str) -> tuple[float, ...]:
    """``0.5:1.1:0.1`` (first, last, step), ``0.5,0.8`` or ``0.9``; raises ConfigInvalid."""
    loads = _range(text) if ":" in text else [_number(part, text) for part in text.split(",")]
    if not all(0 < load < math.inf for load in loads) or sorted(set(loads)) != loads:
        raise ConfigInvalid(
            field="load", value=text, remedy="use ascending shares of saturation above 0"
        )
    if len(loads) > LOADS_MAX:
        raise ConfigInvalid(field="load", value=text, remedy=f"use at most {LOADS_MAX} loads")
    return tuple(loads)


def _range(text: str) -> list[float]:
    parts = [_number(part, text) for part in text.split(":")]
    if len(parts) != 3 or not (parts[2] > 0 and parts[0] <= parts[1]):  # noqa: PLR2004  # as named
        raise ConfigInvalid(
            field="load", value=text, remedy="write FIRST:LAST:STEP, such as 0.5:1.1:0.1"
        )
    first, last, step = parts
    if (last - first) / step > LOADS_MAX:
        raise ConfigInvalid(field="load", value=text, remedy=f"use at most {LOADS_MAX} loads")
    count = math.floor((last - first) / step + 1e-9) + 1
    return [round(first + i * step, 9) for i in range(count)]


def _number(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        remedy = "write shares of saturation: 0.8, 0.5,0.8 or 0.5:1.1:0.1"
        raise ConfigInvalid(field="load", value=text, remedy=remedy)
    return value


def parse_traces(texts: Sequence[str]) -> dict[str, str]:
    """``TRACE`` for the topology's only model, ``MODEL=TRACE`` for each; raises ConfigInvalid."""
    traces: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "", text
        if not path or name in traces or (not name and len(texts) > 1):
            raise ConfigInvalid(
                field="trace", value=text, remedy="give one TRACE, or MODEL=TRACE for each model"
            )
        if not Path(path).is_file():
            raise ConfigInvalid(field="trace", value=path, remedy="no such file")
        traces[name] = path
    return traces


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, at least one; raises ConfigInvalid."""
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    if not wanted:
        raise ConfigInvalid(
            field="policies", value=text, remedy="name policies, separated by commas"
        )
    return wanted


def parse_slo(text: str) -> float | None:
    """None for ``class``, the factor of ``relative:5``; raises ConfigInvalid."""
    if text == "class":
        return None
    name, _, factor = text.partition(":")
    try:
        times = float(factor) if name == RELATIVE else math.nan
    except ValueError:
        times = math.nan
    if not 1 <= times < math.inf:
        raise ConfigInvalid(
            field="slo",
            value=text,
            remedy="use class, or relative:N for N >= 1 times the latencies at rest",
        )
    return times


def parse_class(text: str) -> SloClass:
    if text not in SLO_CLASSES:
        raise ConfigInvalid(
            field="class", value=text, remedy=f"use one of {', '.join(SLO_CLASSES)}"
        )
    return text


def parse_forecast(text: str | None) -> ForecastName | None:
    if text is None or text in FORECASTS:
        return text
    known = ", ".join(FORECASTS)
    raise ConfigInvalid(field="forecast", value=text, remedy=f"use one of {known}")


def parse_jobs(jobs: int) -> int:
    if not 1 <= jobs <= JOBS_MAX:
        raise ConfigInvalid(field="jobs", value=jobs, remedy=f"use 1 to {JOBS_MAX} processes")
    return jobs
