"""The kinds of GPU whose profiles are shipped.

Memory and bandwidths are those of aiconfigurator's system files; links are replaced by fits to
measured transfers where there are any (``links``). Not measured here but typical: ``host`` is 80 %
of the PCIe rate, ``local`` a copy that reads and writes memory at 80 % of its bandwidth, ``disk``
what loading safetensors from a local NVMe drive reaches, ``engine_start_s`` process, communicators,
compilation from cache and CUDA graphs, ``price_per_hour`` a rounded on-demand price of 2025.
"""

from dataclasses import dataclass

from services.profiler.fit.layer import BANDWIDTH_SHARE, LAUNCH_US
from shared.cost.profile import GpuFacts, Link

RESERVED_BYTES = 2_400_000_000
"""Runtime, communicators, CUDA graphs, activations: what is missing on DistServe's A100s between
weights plus KV cache and 95 % of the memory, of OPT-13B; its other models judge it."""
USABLE = 0.9  # vLLM's gpu_memory_utilization
GPUS_PER_NODE = 8
START_S = 30.0
DISK = Link(bytes_per_s=3e9, latency_s=0.01)


@dataclass(frozen=True, slots=True)
class GpuKind:
    """``system``: its name in the operator tables; ``network``: its name in the tables of
    transfers, "" where there are none; ``fp8``: whether it computes in fp8."""

    name: str
    system: str
    memory_bytes: int
    memory_bytes_per_s: float
    peer_bytes_per_s: float
    pcie_bytes_per_s: float
    network_bytes_per_s: float
    price_per_hour: float
    nvlink: bool = True
    fp8: bool = True
    network: str = ""

    def facts(self, source: str, peer: Link | None = None, network: Link | None = None) -> GpuFacts:
        """Links as the data sheet has them, unless measured ones are given."""
        latency_s = 10e-6  # p2p_latency of the system files
        moved = BANDWIDTH_SHARE * self.memory_bytes_per_s / 2
        return GpuFacts(
            gpu=self.name,
            memory_bytes=self.memory_bytes,
            usable=USABLE,
            reserved_bytes=RESERVED_BYTES,
            gpus_per_node=GPUS_PER_NODE,
            price_per_hour=self.price_per_hour,
            local=Link(bytes_per_s=moved, latency_s=LAUNCH_US / 1e6),
            peer=peer or Link(bytes_per_s=self.peer_bytes_per_s, latency_s=latency_s),
            host=Link(bytes_per_s=BANDWIDTH_SHARE * self.pcie_bytes_per_s, latency_s=latency_s),
            network=network or Link(bytes_per_s=self.network_bytes_per_s, latency_s=3 * latency_s),
            disk=DISK,
            engine_start_s=START_S,
            source=source,
        )


A100 = GpuKind(
    name="a100-80", system="a100_sxm", memory_bytes=85_899_345_920, memory_bytes_per_s=2.039e12,
    peer_bytes_per_s=300e9, pcie_bytes_per_s=32e9, network_bytes_per_s=25e9, price_per_hour=1.8,
    fp8=False, network="a100_dgx",
)  # fmt: skip
H100 = GpuKind(
    name="h100", system="h100_sxm", memory_bytes=85_899_345_920, memory_bytes_per_s=3.35e12,
    peer_bytes_per_s=450e9, pcie_bytes_per_s=64e9, network_bytes_per_s=50e9, price_per_hour=3.0,
    network="h100_dgx",
)  # fmt: skip
H200 = GpuKind(
    name="h200", system="h200_sxm", memory_bytes=151_397_597_184, memory_bytes_per_s=4.8e12,
    peer_bytes_per_s=450e9, pcie_bytes_per_s=64e9, network_bytes_per_s=50e9, price_per_hour=3.8,
    network="h100_dgx",
)  # fmt: skip
L40S = GpuKind(
    name="l40s", system="l40s", memory_bytes=48_305_799_168, memory_bytes_per_s=0.864e12,
    peer_bytes_per_s=32e9, pcie_bytes_per_s=32e9, network_bytes_per_s=50e9, price_per_hour=1.9,
    nvlink=False,
)  # fmt: skip

KINDS = {kind.name: kind for kind in (A100, H100, H200, L40S)}
