"""Made-up workloads whose mix of requests is more and more uneven, or moves more and more.

Four kinds (kinds.py) of a real trace; each request's lengths are those of a real request of its
kind. Arrivals are Poisson at one rate throughout, so that thinning them leaves a Poisson process
and only the mix tells one workload from another.

The names follow OServe's evaluation (arXiv 2602.12151): spatial levels S1 to S5, whose mix has a
coefficient of variation of 0.112 to 0.688, and temporal levels T1 to T4. Its mixes and periods are
not published, so these are ours:

- spatial: share[i] = 1/4 (1 + cv z[i]) with z = (3, 1, -1, -3) / sqrt(5), whose mean is 0 and whose
  standard deviation is 1. What grows is what pulls apart: long prompts with short answers first,
  short prompts with long answers second.
- temporal: the mix swings between one of mostly long prompts with short answers and one of mostly
  short prompts with long answers, share(t) = middle + amplitude sin(2 pi t / period) (a - b) / 2,
  farther and faster at each level.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loadgen.workload.kinds import split_of
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid

KINDS = ("long-in/short-out", "short-in/long-out", "long-in/long-out", "short-in/short-out")
"""In the order of ``shares``: the two that differ most come first."""

Shares = tuple[float, ...]
"""Of each of KINDS; they sum to 1."""

SPATIAL: Mapping[str, float] = {"S1": 0.11, "S2": 0.25, "S3": 0.40, "S4": 0.55, "S5": 0.69}
"""Coefficient of variation of the shares."""

_Z = tuple(step / math.sqrt(5.0) for step in (3.0, 1.0, -1.0, -3.0))
CV_MAX = 1.0 / max(_Z)  # beyond, a share would be below 0
_PROMPTS: Shares = (0.7, 0.1, 0.1, 0.1)
_ANSWERS: Shares = (0.1, 0.7, 0.1, 0.1)


@dataclass(frozen=True, slots=True)
class Swing:
    """How far, 1 being from one mix to the other and back, and how long that takes."""

    amplitude: float
    period_s: float


TEMPORAL: Mapping[str, Swing] = {
    "T1": Swing(0.25, 2400.0),
    "T2": Swing(0.5, 1200.0),
    "T3": Swing(0.75, 600.0),
    "T4": Swing(1.0, 300.0),
}


def uneven(cv: float) -> Shares:
    """Shares with this coefficient of variation (standard deviation over mean)."""
    if not 0.0 <= cv <= CV_MAX:
        raise ConfigInvalid(field="cv", value=cv, remedy=f"use 0 to {CV_MAX:.3f}")
    return tuple((1.0 + cv * z) / len(_Z) for z in _Z)


def swung(swing: Swing, at_s: float) -> Shares:
    """The shares at a moment."""
    lean = swing.amplitude * math.sin(2.0 * math.pi * at_s / swing.period_s)
    return tuple(
        (a + b) / 2.0 + lean * (a - b) / 2.0 for a, b in zip(_PROMPTS, _ANSWERS, strict=True)
    )


def mix_of(level: str) -> Callable[[float], Shares]:
    """The shares of a level, S1 to S5 or T1 to T4, by time; raises ConfigInvalid."""
    if level in SPATIAL:
        shares = uneven(SPATIAL[level])
        return lambda _: shares
    if level in TEMPORAL:
        swing = TEMPORAL[level]
        return lambda at_s: swung(swing, at_s)
    known = ", ".join((*SPATIAL, *TEMPORAL))
    raise ConfigInvalid(field="level", value=level, remedy=f"use one of {known}")


def sweep(
    records: Sequence[TraceRecord], level: str, *, rps: float, duration_s: float, seed: int
) -> Iterator[TraceRecord]:
    """Arrivals of a level, labelled by kind, made of the requests of ``records``. Same arguments,
    same arrivals. Raises ConfigInvalid for a level that there is not, or records that lack a
    kind."""
    shares_at = mix_of(level)
    pools = _pools(records)
    rng = random.Random(f"sweep/{level}/{seed}")
    at_s = rng.expovariate(rps)
    while at_s < duration_s:
        edges = list(accumulate(shares_at(at_s)))
        kind = KINDS[min(bisect_left(edges, rng.random() * edges[-1]), len(KINDS) - 1)]
        like = pools[kind][rng.randrange(len(pools[kind]))]
        yield TraceRecord(
            timestamp_s=round(at_s, 6),
            input_tokens=like.input_tokens,
            output_tokens=like.output_tokens,
            label=kind,
        )
        at_s += rng.expovariate(rps)


def _pools(records: Sequence[TraceRecord]) -> dict[str, list[TraceRecord]]:
    pools: dict[str, list[TraceRecord]] = {kind: [] for kind in KINDS}
    if records:
        split = split_of(records)
        for record in records:
            pools[split.kind(record)].append(record)
    missing = [kind for kind, pool in pools.items() if not pool]
    if missing:
        raise ConfigInvalid(
            field="trace",
            value=f"{len(records)} requests",
            remedy=f"use one that has requests of each kind; it lacks {', '.join(missing)}",
        )
    return pools
