"""Who sends what: shares of each want, so that the busiest link is done earliest.

Whole wants are first given to the source that is least busy then. Mostly that reaches what links
take whose bytes have no other way: a bound that costs nothing. Where it does not, a linear program
divides the wants (lp.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.switcher.transfer.links import Loads, Network
from services.switcher.transfer.wants import Holder, Want, options

NEAR = 1.002
"""Whole wants are good enough when they are as near to the bound as that."""

Shares = list[dict[Holder, float]]
"""For each want, which share of its bytes comes from whom."""


@dataclass(frozen=True, slots=True)
class Sourcing:
    """``bound_s``: no shares at all do better."""

    shares: Shares
    bound_s: float


def choose_sources(wants: Sequence[Want], network: Network) -> Sourcing:
    bound_s = _unavoidable_s(wants, network)
    shares, whole_s = _whole(wants, network)
    if whole_s <= NEAR * bound_s:
        return Sourcing(shares, bound_s)
    from services.switcher.transfer import lp  # noqa: PLC0415 - loads scipy, mostly not needed

    divided, bound_s = lp.solve(wants, network, scale_s=whole_s)
    return Sourcing(shares if whole_s <= NEAR * bound_s else divided, bound_s)


def _unavoidable_s(wants: Sequence[Want], network: Network) -> float:
    """How long the busiest link is busy at least: with what takes it whatever is chosen."""
    loads = Loads(network)
    for want in wants:
        ways = [dict(network.way(gpu, want.gpu)) for gpu, _ in options(want)]
        for link, cost_s in ways[0].items():
            if all(link in way for way in ways):
                loads.busy_s[link] += cost_s * want.load_bytes
    return loads.seconds


def _whole(wants: Sequence[Want], network: Network) -> tuple[Shares, float]:
    """Each want from one source: those without a choice first, then the largest first."""
    loads = Loads(network)
    shares: Shares = [{} for _ in wants]
    sizes = [want.load_bytes for want in wants]
    order = sorted(range(len(wants)), key=lambda w: (len(options(wants[w])) > 1, -sizes[w], w))
    for w in order:
        best = _least_busy(wants[w], sizes[w], loads, network)
        loads.add(best[0], wants[w].gpu, sizes[w])
        shares[w] = {best: 1.0}
    return shares, loads.seconds


def _least_busy(want: Want, size: int, loads: Loads, network: Network) -> Holder:
    def key(holder: Holder) -> tuple[float, bool, float, Holder]:
        gpu = holder[0]
        remote = network.remote(gpu, want.gpu)
        return loads.with_s(gpu, want.gpu, size), remote, loads.with_s(gpu, want.gpu, 0), holder

    return min(options(want), key=key)
