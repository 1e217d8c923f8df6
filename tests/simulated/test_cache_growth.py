"""KV caches that were small beside the replicas before them are as large as ever after a switch."""

from loadgen.simulator.switch_mesh import CalmSwitchMesh
from shared.core import Publish
from shared.messages.replicas import HostedReplica, WorkerReport


class Caches:
    """What each worker says of its KV caches, and which of them were ever small."""

    def __init__(self, mesh: CalmSwitchMesh) -> None:
        self.small: set[tuple[str, str]] = set()
        self._last: dict[str, WorkerReport] = {}
        mesh.world.taps.append(self._see)

    def _see(self, _: str, effect: Publish) -> None:
        if isinstance(report := effect.message, WorkerReport):
            self._last[report.worker_id] = report
            held = [held for held in report.replicas if _is_small(held)]
            self.small.update((report.worker_id, one.replica_id) for one in held)

    @property
    def still_small(self) -> list[HostedReplica]:
        return [
            held for report in self._last.values() for held in report.replicas if _is_small(held)
        ]


def _is_small(held: HostedReplica) -> bool:
    return held.cache_bytes < held.cache_bytes_full


def test_after_a_switch_in_tight_memory_all_caches_are_full_again() -> None:
    """Otherwise each switch would leave less room for requests than the one before it had."""
    small = 0
    for seed in range(2000, 2060):
        mesh = CalmSwitchMesh(seed, trace_max=1)
        caches = Caches(mesh)
        mesh.run()
        assert not caches.still_small, (seed, caches.still_small)
        small += len(caches.small)
    assert small > 5, "no switch had to make do with less"
