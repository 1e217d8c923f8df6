"""``python -m loadgen.bench``: every benchmark in its own process, one JSON line a measurement."""

import subprocess
import sys

BENCHMARKS = (
    "loadgen.bench.bench_router",
    "loadgen.bench.bench_data_plane",
    "loadgen.bench.bench_planners",
    "loadgen.bench.bench_predictions",
    "loadgen.bench.bench_simulator",
    "loadgen.bench.bench_fidelity",
    "loadgen.bench.bench_torch_engine",
    "loadgen.bench.bench_torch_fidelity",
    "loadgen.bench.bench_switch",
    "loadgen.bench.bench_transfer",
    "loadgen.bench.bench_compare",
)


def main() -> int:
    codes = [
        subprocess.run([sys.executable, "-m", name], check=False).returncode for name in BENCHMARKS
    ]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
