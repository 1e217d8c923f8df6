"""``python -m services.profiler``."""

from services.profiler.config import ProfilerConfig
from services.profiler.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("profiler", ProfilerConfig, serve)
