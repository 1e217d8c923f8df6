"""``python -m loadgen.bench``: every benchmark in its own process, one JSON line a measurement."""

import subprocess
import sys

BENCHMARKS = ("loadgen.bench.bench_router", "loadgen.bench.bench_data_plane")


def main() -> int:
    codes = [
        subprocess.run([sys.executable, "-m", name], check=False).returncode for name in BENCHMARKS
    ]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
