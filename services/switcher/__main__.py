"""``python -m services.switcher``."""

from services.switcher.config import SwitcherConfig
from services.switcher.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("switcher", SwitcherConfig, serve)
