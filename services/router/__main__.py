"""``python -m services.router``."""

from services.router.config import RouterConfig
from services.router.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("router", RouterConfig, serve)
