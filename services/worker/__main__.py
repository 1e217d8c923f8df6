"""``python -m services.worker --config topology.toml --set worker.worker_id=n0-g0``"""

from services.worker.config import WorkerConfig
from services.worker.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("worker", WorkerConfig, serve)
