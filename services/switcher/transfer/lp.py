"""Shares of wants by linear programming; a module of its own, as scipy is heavy to load.

Sets: wants w of B_w bytes that links see, their holders H_w, links l. c_lwh: seconds of link l for
a byte of w from h.

    minimise    T + EPSILON * (mean time of the nodes' network links)
    busy_l      sum over w, h of c_lwh B_w x_wh <= T
    whole_w     sum over h in H_w of x_wh = 1
                x >= 0

The second term prefers sources of the own node where that costs nothing. It is at most EPSILON * T,
so objective / (1 + EPSILON) is a bound on the time of every plan. A vertex of this program has no
more split wants than it has busy links, so few wants have to be cut.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from services.switcher.transfer.links import LinkName, Network
from services.switcher.transfer.wants import Holder, Want, options

EPSILON = 1e-3
LEAST_SHARE = 1e-5


def solve(
    wants: Sequence[Want], network: Network, *, scale_s: float
) -> tuple[list[dict[Holder, float]], float]:
    """The share of each want's bytes that comes from each holder, and the bound in seconds.
    ``scale_s``: about how long it takes, so that the solver's tolerances mean the same always."""
    columns = [(w, holder) for w, want in enumerate(wants) for holder in options(want)]
    time = len(columns)
    cost = np.zeros(time + 1)
    cost[time] = 1.0
    links: dict[LinkName, int] = {}
    entries: list[tuple[int, int, float]] = []
    for column, (w, holder) in enumerate(columns):
        for link, cost_s in network.way(holder[0], wants[w].gpu):
            share = cost_s * wants[w].load_bytes / scale_s
            entries.append((links.setdefault(link, len(links)), column, share))
            if link[0] == "network_out":
                cost[column] += EPSILON * share / network.node_count
    entries += [(row, time, -1.0) for row in links.values()]
    entries += [(len(links) + w, column, 1.0) for column, (w, _) in enumerate(columns)]
    rows, at, values = zip(*entries, strict=True)
    matrix = csr_array((values, (rows, at)), shape=(len(links) + len(wants), time + 1))
    least = [-np.inf] * len(links) + [1.0] * len(wants)
    most = [0.0] * len(links) + [1.0] * len(wants)
    done = milp(cost, constraints=LinearConstraint(matrix, least, most))
    # Every want has a source, and no link has a limit: there is a solution.
    assert done.x is not None, done.message
    found = np.asarray(done.x, np.float64)
    shares: list[dict[Holder, float]] = [{} for _ in wants]
    for (w, holder), share in zip(columns, found[:time], strict=True):
        if share > LEAST_SHARE:
            shares[w][holder] = float(share)
    return shares, float(cost @ found) * scale_s / (1 + EPSILON)
