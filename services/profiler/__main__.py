"""``python -m services.profiler``: the service, or with a command its fits."""

import sys

from services.profiler.config import ProfilerConfig
from services.profiler.fit.command import COMMANDS, run
from services.profiler.service import serve
from shared.service import run_service

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(run(sys.argv[1:]))
    run_service("profiler", ProfilerConfig, serve)
