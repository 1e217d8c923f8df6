"""``python -m services.forecaster``."""

from services.forecaster.config import ForecasterConfig
from services.forecaster.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("forecaster", ForecasterConfig, serve)
