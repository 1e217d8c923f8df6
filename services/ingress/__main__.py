"""``python -m services.ingress``: the HTTP edge of the mesh."""

from services.ingress.config import IngressConfig
from services.ingress.service import serve
from shared.service import run_service

if __name__ == "__main__":
    run_service("ingress", IngressConfig, serve)
