"""The requests of a rehearsal: drawn once for a forecast, and the same for every plan.

Arrivals are Poisson, of one rate or of a ``Pattern`` of rates. Each request has its true type, and
the one that a router takes it for, who sees its prompt alone (``beliefs.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.beliefs import guessed
from services.scheduler.policies.capacity_types import TypeDemand
from services.scheduler.policies.flow import Array
from services.scheduler.policies.history import Pattern

SPREAD_LN = 0.5
"""Standard deviation of ln(tokens) within one type: what the profiler's clustering leaves of public
traces with four to six types (0.4 to 0.6 for Azure 2023, of inputs and of outputs)."""
SPREADS_MAX = 3.0  # lengths are cut off at so many of them: beyond, contexts are at their limit
WARM_SHARE = 0.2  # of the time, from an empty start to something like the steady state
DRAWN_MAX = 30_000  # requests; with more the time is shortened: some 0.6 s of work


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drawn:
    """Rows by time. ``kinds`` are indices of types, ``taken_for`` those of the types whose rows of
    weights they are sent by; ``lots``, uniform on [0, 1), say who is left out where not all
    replicas are rehearsed. Arrivals from ``warm_s`` on count."""

    seconds: float
    warm_s: float
    at_s: Array
    kinds: npt.NDArray[np.intp]
    taken_for: npt.NDArray[np.intp]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    lots: Array

    def __len__(self) -> int:
        return len(self.at_s)


def draw(
    types: Sequence[TypeDemand],
    *,
    seconds: float,
    seed: int,
    backlog: Mapping[int, int] | None = None,
    pattern: Pattern | None = None,
    spread_ln: float = SPREAD_LN,
) -> Drawn:
    """Poisson arrivals of ``types`` over ``seconds``, with log-normal lengths around their means.
    ``pattern``: how their rates change, again and again; else they are those of the types.
    ``backlog``: by index of a type, requests that wait already; with any, the rehearsal begins in
    earnest at once, and they count. Each type has a stream of its own, so that another type, or
    more of it, does not change its requests."""
    assert types, "a forecast of nothing cannot be rehearsed"
    total = seconds * sum(kind.arrivals_rps for kind in types)
    seconds *= min(1.0, DRAWN_MAX / max(total, 1.0))
    parts: list[tuple[Array, ...]] = []
    for j, kind in enumerate(types):
        stream = np.random.default_rng([seed, j])
        waiting = (backlog or {}).get(j, 0)
        times_s, expected = _expected(kind, j, seconds, pattern)
        arrivals = int(stream.poisson(float(expected[-1])))
        # Arrivals are uniform in what is expected, whatever the rate.
        drawn = np.sort(stream.uniform(0.0, expected[-1], arrivals))
        at_s = np.concatenate([np.zeros(waiting), np.interp(drawn, expected, times_s)])
        parts.append(
            (
                at_s,
                np.full(len(at_s), float(j)),
                _lengths(stream, kind.input_tokens, len(at_s), spread_ln),
                _lengths(stream, kind.output_tokens, len(at_s), spread_ln),
                stream.uniform(0.0, 1.0, len(at_s)),
                stream.uniform(0.0, 1.0, len(at_s)),
            )
        )
    at_s, kinds, inputs, outputs, lots, guesses = (
        np.concatenate([part[k] for part in parts]) for k in range(6)
    )
    order = np.argsort(at_s, kind="stable")
    taken_for = guessed(types, kinds.astype(np.intp), inputs, guesses)
    return Drawn(
        seconds=seconds,
        warm_s=0.0 if backlog else WARM_SHARE * seconds,
        at_s=at_s[order],
        kinds=kinds[order].astype(np.intp),
        taken_for=taken_for[order],
        input_tokens=inputs[order].astype(np.int64),
        output_tokens=outputs[order].astype(np.int64),
        lots=lots[order],
    )


def _expected(
    kind: TypeDemand, j: int, seconds: float, pattern: Pattern | None
) -> tuple[Array, Array]:
    """Requests of type ``j`` expected up to points in time, from 0 to ``seconds``."""
    if pattern is None:
        return np.array([0.0, seconds]), np.array([0.0, kind.arrivals_rps * seconds])
    rounds = ceil(seconds / pattern.length_s)
    lasts_s, rates = np.tile(pattern.seconds, rounds), np.tile(pattern.rates[:, j], rounds)
    times_s = np.concatenate([[0.0], np.cumsum(lasts_s)])
    expected = np.concatenate([[0.0], np.cumsum(lasts_s * rates)])
    last = float(np.interp(seconds, times_s, expected))
    before = times_s < seconds
    return np.append(times_s[before], seconds), np.append(expected[before], last)


def _lengths(stream: np.random.Generator, mean: float, count: int, spread_ln: float) -> Array:
    """Whole tokens, one at least, whose logarithms are normal and whose mean is ``mean``."""
    normal = np.clip(stream.standard_normal(count), -SPREADS_MAX, SPREADS_MAX)
    return np.maximum(1.0, np.rint(mean * np.exp(spread_ln * normal - spread_ln**2 / 2)))
