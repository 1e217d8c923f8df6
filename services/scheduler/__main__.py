"""``python -m services.scheduler``."""

from services.scheduler.config import SchedulerConfig
from services.scheduler.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("scheduler", SchedulerConfig, serve)
