"""The torch engine on an NVIDIA GPU gives the tokens that it gives on the CPU."""

from pathlib import Path

import pytest

from services.worker.engine.interface import Engine, EngineRequest
from shared.messages.requests import SamplingParams

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.key: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for chunk in engine.step().chunks:
            tokens[chunk.key] += chunk.tokens
    engine.check()
    return tokens


@pytest.mark.timeout(300)
def test_greedy_tokens_equal_the_cpus(tmp_path: Path) -> None:
    """A model would answer differently on a GPU than the tests here have shown."""
    from services.worker.engine.torch_engine.config import TorchEngineConfig
    from services.worker.engine.torch_engine.engine import load_torch_engine
    from services.worker.engine.torch_engine.make_model import make_model

    folder = tmp_path / "tiny"
    make_model(folder, size="tiny")
    requests = [
        EngineRequest(
            key=f"r{i}",
            prompt_tokens=[(i * 31 + j * 7) % 250 for j in range(20 + 40 * i)],
            sampling=SamplingParams(output_tokens_max=32, temperature=0.0, ignore_eos=True),
        )
        for i in range(6)
    ]
    made: dict[str, dict[str, list[int]]] = {}
    for device in ("cpu", "cuda"):
        config = TorchEngineConfig(device=device, dtype="float32", kv_memory_bytes=64 << 20)
        engine = load_torch_engine(str(folder), config)
        made[device] = run(engine, requests)
        engine.close()
    assert made["cuda"] == made["cpu"]
