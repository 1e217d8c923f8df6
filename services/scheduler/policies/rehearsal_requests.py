"""The requests of a rehearsal: drawn once for a forecast, and the same for every plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.capacity import TypeDemand
from services.scheduler.policies.flow import Array

SPREAD_LN = 0.5
"""Standard deviation of ln(tokens) within one type: what the profiler's clustering leaves of public
traces with four to six types (0.4 to 0.6 for Azure 2023, of inputs and of outputs)."""
SPREADS_MAX = 3.0  # lengths are cut off at so many of them: beyond, contexts are at their limit
WARM_SHARE = 0.2  # of the time, from an empty start to something like the steady state
DRAWN_MAX = 2_000_000  # requests; with more the time is shortened


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drawn:
    """Rows by time. ``kinds`` are indices of types; ``lots``, uniform on [0, 1), say who is left
    out where not all replicas are rehearsed. Arrivals from ``warm_s`` on count."""

    seconds: float
    warm_s: float
    at_s: Array
    kinds: npt.NDArray[np.intp]
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
    spread_ln: float = SPREAD_LN,
) -> Drawn:
    """Poisson arrivals of ``types`` over ``seconds``, with log-normal lengths around their means.
    ``backlog``: by index of a type, requests that wait already; with any, the rehearsal begins in
    earnest at once, and they count. Each type has a stream of its own, so that another type, or
    more of it, does not change its requests."""
    assert types, "a forecast of nothing cannot be rehearsed"
    expected = seconds * sum(kind.arrivals_rps for kind in types)
    seconds *= min(1.0, DRAWN_MAX / max(expected, 1.0))
    parts: list[tuple[Array, ...]] = []
    for j, kind in enumerate(types):
        stream = np.random.default_rng([seed, j])
        waiting = (backlog or {}).get(j, 0)
        arrivals = int(stream.poisson(kind.arrivals_rps * seconds))
        at_s = np.concatenate([np.zeros(waiting), np.sort(stream.uniform(0.0, seconds, arrivals))])
        parts.append(
            (
                at_s,
                np.full(len(at_s), float(j)),
                _lengths(stream, kind.input_tokens, len(at_s), spread_ln),
                _lengths(stream, kind.output_tokens, len(at_s), spread_ln),
                stream.uniform(0.0, 1.0, len(at_s)),
            )
        )
    at_s, kinds, inputs, outputs, lots = (np.concatenate(c) for c in zip(*parts, strict=True))
    order = np.argsort(at_s, kind="stable")
    return Drawn(
        seconds=seconds,
        warm_s=0.0 if backlog else WARM_SHARE * seconds,
        at_s=at_s[order],
        kinds=kinds[order].astype(np.intp),
        input_tokens=inputs[order].astype(np.int64),
        output_tokens=outputs[order].astype(np.int64),
        lots=lots[order],
    )


def _lengths(stream: np.random.Generator, mean: float, count: int, spread_ln: float) -> Array:
    """Whole tokens, one at least, whose logarithms are normal and whose mean is ``mean``."""
    normal = np.clip(stream.standard_normal(count), -SPREADS_MAX, SPREADS_MAX)
    return np.maximum(1.0, np.rint(mean * np.exp(spread_ln * normal - spread_ln**2 / 2)))
