"""A real sweep of vLLM. Runs where vLLM is installed, which wants an environment of its own."""

import importlib.util
from pathlib import Path

import pytest

from deploy.measure import run_measure
from services.worker.engine.torch_engine.make_model import make_model
from shared.cost.memory import kv_blocks
from shared.cost.model import cost_model
from shared.cost.step import PS_PER_S
from shared.hardware import Parallelism

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
SETTINGS = ("batch_tokens_max=32", "running_max=4", "context_tokens_max=512")
BLOCK_TOKENS, BLOCK_BYTES = 32, 32 * 2 * 10 * 4 * 64 * 4  # of the small model in float32


def test_a_sweep_of_vllm_writes_a_profile_that_predicts_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new vLLM that schedules otherwise, or calls things otherwise, would go unnoticed."""
    checkpoint, out = tmp_path / "small", tmp_path / "profiles"
    make_model(checkpoint, "small")
    asked = ["--engine", "vllm", "--model", str(checkpoint), "--out", str(out), "--seconds", "45"]
    for setting in (*SETTINGS, f"kv_memory_bytes={100 * BLOCK_BYTES}"):
        asked += ["--set", setting]
    assert run_measure(asked) == 0, capfd.readouterr()
    read = cost_model("cpu", "small", Parallelism(), folders=(out,))
    blocks = kv_blocks(read.profile, read.gpu, Parallelism(), block_tokens=BLOCK_TOKENS)
    assert blocks == 99  # and vLLM's null block
    assert read.profile.source.startswith("oserve profile measure of vLLM ")
    assert read.profile.error.step_median < 1
    one, four = (read.step.step_ps(batch, 100 * batch) / PS_PER_S for batch in (1, 4))
    assert 1e-4 < one <= four < 1


def test_settings_that_vllm_refuses_are_told_in_its_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stack of forty frames would hide which setting is at fault."""
    checkpoint = tmp_path / "small"
    make_model(checkpoint, "small")
    asked = ["--engine", "vllm", "--model", str(checkpoint), "--out", str(tmp_path / "out")]
    assert run_measure([*asked, "--set", "block_tokens=16"]) == 78
    assert "vLLM says: No common block size for 16" in capfd.readouterr().err
