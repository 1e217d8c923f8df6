"""Weights between two processes on one GPU, by CUDA IPC."""

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.torch_engine.measure_transfer import measure  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.gpu]

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU and torch for CUDA", allow_module_level=True)


def test_weights_come_through_cuda_ipc_and_over_tcp() -> None:
    """On a GPU a switch would otherwise fail, or go through the host. ``measure`` itself compares
    what has come."""
    figures = measure(64 * 2**20, rounds=1, device=torch.device("cuda"))
    assert figures["device"] == "cuda"
    assert isinstance(figures["bytes"], int)
    assert figures["bytes"] > 32 * 2**20
