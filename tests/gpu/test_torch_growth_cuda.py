"""A KV cache that was small grows on an NVIDIA GPU, and the memory that it had is given back."""

from pathlib import Path

import pytest

from services.worker.engine.interface import EngineRequest
from shared.messages.requests import SamplingParams

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


@pytest.mark.timeout(300)
def test_a_cache_grows_under_live_requests(tmp_path: Path) -> None:
    """A replica on GPUs would else lose its requests' KV cache, or hold two caches for good."""
    from services.worker.engine.torch_engine.config import TorchEngineConfig
    from services.worker.engine.torch_engine.make_model import make_model
    from tests.support.rank_threads import ThreadReplica

    folder = tmp_path / "tiny"
    make_model(folder, size="tiny")
    config = TorchEngineConfig(device="cuda", dtype="float32", kv_blocks=512)
    texts: list[dict[str, list[int]]] = []
    for small in (0, 64):
        engine = ThreadReplica(folder, "tp1", config, name="g", cache_blocks=small).engine
        texts.append({f"r{i}": [] for i in range(4)})
        for i, key in enumerate(texts[-1]):
            sampling = SamplingParams(output_tokens_max=32, temperature=0.0, ignore_eos=True)
            prompt = [(i * 31 + j * 7) % 250 for j in range(20 + 40 * i)]
            engine.add(EngineRequest(key=key, prompt_tokens=prompt, sampling=sampling))
        steps = 0
        while engine.has_work:
            for chunk in engine.step().chunks:
                texts[-1][chunk.key] += chunk.tokens
            if (steps := steps + 1) == 8:  # in the middle
                missing = engine.cache_bytes_full - engine.cache_bytes
                before = torch.cuda.memory_allocated()
                engine.grow_cache()
                assert engine.cache_bytes == engine.cache_bytes_full
                assert torch.cuda.memory_allocated() - before == missing
        engine.check()
        engine.close()
    assert texts[0] == texts[1]
