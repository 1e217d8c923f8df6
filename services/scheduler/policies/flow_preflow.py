"""OServe's own lower level: preflow-push on the network with unlike units (arXiv 2602.12151).

    source -> type j     capacity d[j]                  in requests/s
    type j -> replica k  capacity e[k, j] * y[k]        in requests/s
    replica k -> sink    capacity M[k] * y[k]           in units; a request takes M[k] / n[k, j]

As reported, M[k] is the least common multiple of the replica's rates, so that all capacities are
integers. With floats it cancels out (and real rates have multiples beyond 1e14), so M[k] is 1 here
and units are shares of the replica's time. Replica nodes are split in two in the paper; the arc
between the halves is the one to the sink here, which changes nothing.

Pushing along an arc changes the unit: this is a flow *with gains*, and preflow-push (Goldberg and
Tarjan, 1988) ends as soon as no path is left from source to sink. It then fills the sink's arcs as
far as they can be filled if all replicas rank the types alike (n[k, j] = a[k] * b[j]: units can be
chosen so that all gains are 1); if requests of all types take the same time as well (b[j] = 1),
that is the most requests. Elsewhere it may stop short of ``flow.best_flow(instance, "served")``:

- Under overload it does not prefer the types of which a replica serves more per second.
- Two types may sit on each other's better replica with both replicas full; exchanging them would
  take an improving cycle, which it never looks for.

tests/unit/test_flow_preflow.py shows each case.
"""

from collections import deque

import numpy as np

from services.scheduler.policies.flow import Array, Flow, Instance, measured, verify

NEGLIGIBLE = 1e-9
"""Of a type's demand or a row's capacity: less excess, or room, than that counts as none, so that
rounding cannot keep a node active."""


def preflow_push(instance: Instance) -> Flow:
    """A maximal flow of ``instance``. Deterministic: types and replicas in their order."""
    pushing = _Pushing(instance)
    pushing.run()
    flow = measured(instance, pushing.sent)
    wrong = verify(instance, flow, served_max=1.0)
    assert not wrong, wrong
    return flow


class _Pushing:
    """Nodes: types 0..J-1, then replicas J..J+K-1; source and sink only by their labels, which are
    the number of nodes and 0."""

    def __init__(self, instance: Instance) -> None:
        self._n = instance.rates
        open_ = (instance.rates > 0) & (instance.copies[:, None] > 0)
        self._room = np.zeros_like(instance.rates)
        np.multiply(instance.ceilings, instance.copies[:, None], out=self._room, where=open_)
        self._capacity, self._demand = instance.copies, instance.demand
        self.sent: Array = np.zeros_like(instance.rates)
        replicas, self._types = instance.rates.shape
        self._used = np.zeros(replicas)
        self._nodes = replicas + self._types + 2
        self._labels = [0] * (replicas + self._types)
        self._excess = np.concatenate([instance.demand, np.zeros(replicas)])
        self._small = NEGLIGIBLE * np.concatenate([instance.demand, np.maximum(self._capacity, 1)])
        self._active = deque(range(self._types))

    def run(self) -> None:
        pushes_max = 4 * self._nodes**2 * (self._n.size + self._nodes)  # of the FIFO order, n^2 m
        for _ in range(pushes_max):
            if not self._active:
                return
            node = self._active.popleft()
            self._discharge(node)
        raise AssertionError(f"preflow-push still runs after {pushes_max} discharges")

    def _discharge(self, node: int) -> None:
        """Push the node's excess downhill, raising it whenever nothing lies below."""
        while self._excess[node] > self._small[node]:
            lowest = 2 * self._nodes
            for to, room in self._residual(node):
                label = self._label(to)
                if label == self._labels[node] - 1:
                    self._push(node, to, min(room, float(self._excess[node])))
                    if self._excess[node] <= self._small[node]:
                        return
                else:
                    lowest = min(lowest, label)
            self._labels[node] = max(lowest, self._labels[node]) + 1
            assert self._labels[node] <= 2 * self._nodes, "active, yet no way back to the source"

    def _residual(self, node: int) -> list[tuple[int, float]]:
        """Neighbours with room left, in the node's units; -1 is the source, -2 the sink."""
        if node < self._types:
            room = self._room[:, node] - self.sent[:, node]
            forward = [
                (self._types + int(k), float(room[k]))
                for k in np.flatnonzero(room > NEGLIGIBLE * self._demand[node])
            ]
            return [*forward, (-1, np.inf)]  # what came from the source may all go back
        k = node - self._types
        left = float(self._capacity[k] - self._used[k])
        forward = [(-2, left)] if left > self._small[node] else []
        back = np.flatnonzero(self.sent[k] > NEGLIGIBLE * self._demand)
        return [*forward, *((int(j), float(self.sent[k, j] / self._n[k, j])) for j in back)]

    def _push(self, node: int, to: int, amount: float) -> None:
        self._excess[node] -= amount
        if to == -1:
            return
        if to == -2:  # noqa: PLR2004  # the sink
            self._used[node - self._types] += amount
            return
        if node < self._types:
            k = to - self._types
            self.sent[k, node] += amount
            self._gain(to, amount / self._n[k, node])
        else:
            k = node - self._types
            requests = min(amount * self._n[k, to], self.sent[k, to])
            self.sent[k, to] -= requests
            self._gain(to, float(requests))

    def _gain(self, node: int, amount: float) -> None:
        if self._excess[node] <= self._small[node] and node not in self._active:
            self._active.append(node)
        self._excess[node] += amount

    def _label(self, node: int) -> int:
        return {-1: self._nodes, -2: 0}.get(node, self._labels[node] if node >= 0 else 0)
