"""How simulated workers reach each other for weights, KV cache and requests: by address.

Bulk data takes no message of the broker, so that none of it gets lost or overtakes; but whom it is
asked of may have ended, stand still, or be cut off.
"""

from typing import TYPE_CHECKING

from loadgen.simulator.process import Port

if TYPE_CHECKING:
    from loadgen.simulator.engines import Engines

PATIENCE_S = 2.0
"""Who does not answer for so long counts as lost, as in production."""


class Peers:
    """Every worker process of a world, by its address."""

    def __init__(self) -> None:
        self._known: dict[str, Engines] = {}

    def join(self, address: str, engines: "Engines") -> None:
        self._known[address] = engines

    def at(self, address: str) -> "Engines | None":
        """The process there; None if it has ended, or there never was one."""
        engines = self._known.get(address)
        if engines is not None and not engines.port.alive:
            del self._known[address]
            return None
        return engines

    def silence_s(self, port: Port, address: str) -> float:
        """How long until ``port``'s process and the one at ``address`` hear each other."""
        engines = self.at(address)
        if engines is None:
            return PATIENCE_S
        return max(port.silence_s, engines.port.silence_s)
