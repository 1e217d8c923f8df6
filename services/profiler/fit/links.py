"""Links between GPUs, fitted to measured transfers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from services.profiler.fit.csv_source import read_table
from services.profiler.fit.gpus import GpuKind
from services.profiler.fit.grid import Floats, non_negative
from shared.cost.profile import Link

WORDS = (
    "links between GPUs: sends measured by the authors of Vidur (microsoft/vidur@7d47513363ec, MIT)"
)


def measured_links(folder: Path, kind: GpuKind) -> tuple[Link | None, Link | None]:
    """(within a node, between nodes), or None where the folder has no transfers of it."""
    path = folder / "vidur" / "network_median_ms.csv.gz"
    if not kind.network or not path.is_file():
        return None, None
    found: list[Link] = []
    columns = ("bytes", "median_ms")
    for per_node in ("2", "1"):
        rows = list(
            read_table(
                path,
                columns,
                network=kind.network,
                op="send_recv",
                num_workers="2",
                devices_per_node=per_node,
            )
        )
        found.append(fit_link([float(b) for b, _ in rows], [float(ms) / 1e3 for _, ms in rows]))
    return found[0], found[1]


def fit_link(byte_counts: Sequence[float], seconds: Sequence[float]) -> Link:
    """Latency and rate by relative least squares."""
    sizes: Floats = np.array(byte_counts, dtype=np.float64)
    taken: Floats = np.array(seconds, dtype=np.float64)
    matrix = np.stack([np.full(len(sizes), 1e-6), sizes * 1e-9], axis=1) / taken[:, None]
    latency_us, ns_per_byte = non_negative(matrix, np.ones(len(sizes))).tolist()
    return Link(bytes_per_s=round(1e9 / ns_per_byte, -7), latency_s=round(latency_us / 1e6, 8))
