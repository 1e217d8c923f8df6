"""Which links a copy loads, and how long the busiest of them is busy."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from services.switcher.transfer.problem import Links
from shared.placement.copies import DISK

LinkName = tuple[str, str]
"""Kind of link, and the GPU or node whose it is."""


class Network:
    """The links of a mesh. What a byte costs is in seconds."""

    def __init__(self, links: Links, nodes: Mapping[str, str]) -> None:
        self._links = links
        self._nodes = nodes
        self._known: dict[tuple[str, str], tuple[tuple[LinkName, float], ...]] = {}
        self.node_count = len(set(nodes.values()))

    def way(self, source: str, target: str) -> tuple[tuple[LinkName, float], ...]:
        """The links between two GPUs (or DISK and one) with the seconds that a byte takes."""
        key = (source, target)
        if key not in self._known:
            self._known[key] = tuple(self._way(source, target))
        return self._known[key]

    def remote(self, source: str, target: str) -> bool:
        """Whether bytes leave their node."""
        return source != DISK and self._nodes[source] != self._nodes[target]

    def _way(self, source: str, target: str) -> Iterable[tuple[LinkName, float]]:
        links, node = self._links, self._nodes[target]
        memory = (("memory", node), 1 / links.local)
        if source == DISK:
            yield ("disk", node), 1 / links.disk
            yield memory if links.one_memory else (("host", target), 1 / links.host)
            return
        if source == target and not links.one_memory:
            yield ("local", target), 1 / links.local
            return
        if links.one_memory:
            yield memory
        else:
            yield ("out", source), 1 / links.peer
            yield ("in", target), 1 / links.peer
        if self.remote(source, target):
            if links.one_memory:
                yield ("memory", self._nodes[source]), 1 / links.local
            yield ("network_out", self._nodes[source]), 1 / links.network
            yield ("network_in", node), 1 / links.network


class Loads:
    """How long each link is busy."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.busy_s: defaultdict[LinkName, float] = defaultdict(float)

    def add(self, source: str, target: str, byte_count: float) -> None:
        for link, cost_s in self._network.way(source, target):
            self.busy_s[link] += cost_s * byte_count

    def with_s(self, source: str, target: str, byte_count: float) -> float:
        """Of the links of that way, how long the busiest would be."""
        return max(
            self.busy_s[link] + cost_s * byte_count
            for link, cost_s in self._network.way(source, target)
        )

    @property
    def seconds(self) -> float:
        return max(self.busy_s.values(), default=0.0)
