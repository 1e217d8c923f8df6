"""Predicted TTFT and TPOT of each type on a replica that serves a mix of them: mean, median, tail.

``joint_steady`` answers for a replica in its steady state. Near and above saturation nothing is
stationary within a horizon H: the steady part is taken at ``FULL`` load then. The wait stays below
2.33 sqrt(H / arrivals), the spread of what arrives in H, plus what piles up by its middle,
H / 2 * (utilisation - 1). So lateness is finite, rises with load, and overloads can be compared.

Arrivals are taken to be Poisson: bursts make it optimistic. It ranks plans; a rehearsal plays the
best of them through.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from services.scheduler.policies.joint_state import Z99, Load, Tail
from services.scheduler.policies.joint_steady import SteadyReplica
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel

__all__ = ["Load", "Tail", "tails"]

UTILISATION_MAX = 1e6  # "infinitely" overloaded, as a number
FULL = 0.95  # the load above which waits are no longer those of a steady state


def tails(
    model: CostModel, loads: Sequence[Load], limits: EngineLimits, *, horizon_s: float
) -> list[Tail]:
    """One for each of ``loads``, in their order; all together are the replica's load."""
    arrivals = sum(load.arrivals_rps for load in loads)
    limits = limits.in_stages(model.shape.pp)
    replica = SteadyReplica(model, loads, limits)
    utilisation = min(replica.utilisation(), UTILISATION_MAX)
    if utilisation <= FULL:
        state = replica.state()
        return [
            _bounded(tail, arrivals, horizon_s, utilisation) for tail in state.tails(utilisation)
        ]
    part = [replace(load, arrivals_rps=FULL / utilisation * load.arrivals_rps) for load in loads]
    state = SteadyReplica(model, part, limits).state()
    return [_unsteady(tail, arrivals, horizon_s) for tail in state.tails(utilisation)]


def _bounded(tail: Tail, arrivals: float, horizon_s: float, utilisation: float) -> Tail:
    """No wait is longer than what a horizon's arrivals can bring about."""
    worst_s = _worst_s(tail, arrivals / max(utilisation, FULL), horizon_s)
    return replace(
        tail,
        ttft_s=min(tail.ttft_s, worst_s),
        ttft_s_mean=min(tail.ttft_s_mean, worst_s),
    )


def _unsteady(tail: Tail, arrivals: float, horizon_s: float) -> Tail:
    """From ``FULL`` on waits grow to the worst that chance brings, then by what piles up."""
    utilisation = tail.utilisation
    worst_s = _worst_s(tail, arrivals / utilisation, horizon_s)
    piled_s = horizon_s / 2 * max(0.0, utilisation - 1.0)
    near = (1.0 - FULL) / max(1.0 - utilisation, 1e-9) if utilisation < 1.0 else float("inf")
    return replace(
        tail,
        ttft_s=min(near * tail.ttft_s, worst_s) + piled_s,
        ttft_s_mean=min(near * tail.ttft_s_mean, worst_s) + piled_s,
        ttft_s_p50=min(near * tail.ttft_s_p50, worst_s) + piled_s,
    )


def _worst_s(tail: Tail, full_rps: float, horizon_s: float) -> float:
    """TTFT at a load of ``full_rps``, which the replica just bears."""
    return tail.ttft_s_p50 + Z99 * sqrt(horizon_s / full_rps)
