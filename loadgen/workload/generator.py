"""A built-in workload for machines without a trace: four types whose rates and lengths shift.

Each type follows knots over the run, linear in between: rate, median prompt and median output.
Arrivals are a non-homogeneous Poisson process, drawn by thinning (Lewis and Shedler, 1979);
lengths are lognormal about the medians of the moment.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence

import msgspec

from loadgen.workload.records import TOKENS_MAX, TraceRecord
from shared.errors import ConfigInvalid
from shared.slo import SloClass


class Knot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A type's rate and lengths at one point of the run; ``at`` runs from 0 to 1."""

    at: float
    rate_rps: float
    input_tokens_median: float
    output_tokens_median: float


class TypeSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One type of request over the run. A sigma is that of the logarithm of the length."""

    label: str
    knots: tuple[Knot, ...]
    input_sigma: float
    output_sigma: float
    slo_class: SloClass | None = None

    def __post_init__(self) -> None:
        at = [knot.at for knot in self.knots]
        if not at or at != sorted(at) or at[0] < 0 or at[-1] > 1:
            raise ConfigInvalid(
                field=f"{self.label}.knots", value=at, remedy="order `at` from 0 to 1, at least one"
            )


def _knots(*rows: tuple[float, float, float, float]) -> tuple[Knot, ...]:
    return tuple(
        Knot(at=at, rate_rps=rate, input_tokens_median=inputs, output_tokens_median=outputs)
        for at, rate, inputs, outputs in rows
    )


DEFAULT_TYPES: tuple[TypeSchedule, ...] = (
    TypeSchedule(  # people talking: steady, follow-up turns make prompts grow
        label="chat",
        knots=_knots((0.0, 4.0, 300, 180), (0.5, 5.0, 420, 200), (1.0, 3.0, 600, 220)),
        input_sigma=0.9,
        output_sigma=0.7,
        slo_class="interactive",
    ),
    TypeSchedule(  # completions in editors: long context, short answer, a burst in the first half
        label="code",
        knots=_knots((0.0, 1.0, 1800, 24), (0.25, 6.0, 2200, 30), (0.5, 1.0, 1800, 24)),
        input_sigma=0.7,
        output_sigma=0.8,
        slo_class="interactive",
    ),
    TypeSchedule(  # summaries of documents: they take over in the second half
        label="document",
        knots=_knots((0.0, 0.3, 6000, 250), (0.5, 0.3, 7000, 280), (0.75, 2.0, 9000, 320)),
        input_sigma=0.5,
        output_sigma=0.5,
        slo_class="standard",
    ),
    TypeSchedule(  # reasoning: short questions, answers that grow over the run
        label="reasoning",
        knots=_knots((0.0, 0.2, 200, 900), (0.6, 0.4, 220, 1400), (1.0, 1.2, 260, 2000)),
        input_sigma=0.6,
        output_sigma=0.6,
        slo_class="batch",
    ),
)


def generate(
    *, duration_s: float, seed: int = 0, types: Sequence[TypeSchedule] = DEFAULT_TYPES
) -> Iterator[TraceRecord]:
    """Records of the whole run in order of time; the same seed gives the same run."""
    if not 0 < duration_s < math.inf:
        raise ConfigInvalid(field="duration_s", value=duration_s, remedy="use a number above 0")
    streams = [_arrivals(kind, duration_s=duration_s, seed=seed) for kind in types]
    return heapq.merge(*streams, key=lambda record: record.timestamp_s)


def _arrivals(kind: TypeSchedule, *, duration_s: float, seed: int) -> Iterator[TraceRecord]:
    draws = random.Random(f"{seed}/{kind.label}")
    rate_max = max(knot.rate_rps for knot in kind.knots)
    if rate_max <= 0:
        return
    now_s = 0.0
    while True:
        now_s += draws.expovariate(rate_max)
        if now_s >= duration_s:
            return
        knot = _between(kind.knots, now_s / duration_s)
        if draws.random() * rate_max > knot.rate_rps:
            continue
        yield TraceRecord(
            timestamp_s=now_s,
            input_tokens=_lognormal(draws, knot.input_tokens_median, kind.input_sigma),
            output_tokens=_lognormal(draws, knot.output_tokens_median, kind.output_sigma),
            label=kind.label,
            slo_class=kind.slo_class,
        )


def _between(knots: Sequence[Knot], at: float) -> Knot:
    """The knots' values at ``at``; constant before the first and after the last."""
    if at <= knots[0].at:
        return knots[0]
    for left, right in itertools.pairwise(knots):
        if at <= right.at:
            share = (at - left.at) / (right.at - left.at)
            return Knot(
                at=at,
                rate_rps=_mix(left.rate_rps, right.rate_rps, share),
                input_tokens_median=_mix(
                    left.input_tokens_median, right.input_tokens_median, share
                ),
                output_tokens_median=_mix(
                    left.output_tokens_median, right.output_tokens_median, share
                ),
            )
    return knots[-1]


def _mix(left: float, right: float, share: float) -> float:
    return left + (right - left) * share


def _lognormal(draws: random.Random, median: float, sigma: float) -> int:
    return min(TOKENS_MAX, max(1, round(draws.lognormvariate(math.log(median), sigma))))
