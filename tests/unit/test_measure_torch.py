"""A real sweep of the torch engine."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.torch_engine.make_model import make_model  # noqa: E402
from services.worker.measure.__main__ import main  # noqa: E402
from shared.cost.memory import kv_blocks  # noqa: E402
from shared.cost.model import cost_model  # noqa: E402
from shared.cost.step import PS_PER_S  # noqa: E402
from shared.hardware import Parallelism  # noqa: E402

pytestmark = pytest.mark.torch


def test_a_sweep_of_a_real_engine_writes_a_profile_that_predicts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one command that turns an engine into numbers would not work on an engine."""
    checkpoint, out = tmp_path / "tiny", tmp_path / "profiles"
    make_model(checkpoint)
    arguments = ["--engine", "torch", "--model", str(checkpoint), "--out", str(out)]
    arguments += ["--gpu-name", "box"]
    for setting in (
        "threads=1", "batch_tokens_max=64", "running_max=8", "context_tokens_max=512",
        "kv_blocks=256",
    ):  # fmt: skip
        arguments += ["--set", setting]
    short = main([*arguments, "--seconds", "6"])
    assert short == 0 or main([*arguments, "--seconds", "30"]) == 0  # a very busy machine
    text = capsys.readouterr().out
    assert "written: " in text
    assert "held out" in text
    read = cost_model("box", "tiny", Parallelism(), folders=(out,))
    assert kv_blocks(read.profile, read.gpu, Parallelism(), block_tokens=16) == 256
    assert "threads: 1" in read.profile.source
    assert read.profile.error.step_median < 2
    assert read.gpu.engine_start_s > 0
    # Sane on any machine: a step of one token takes from 10 us to 1 s, and more take longer.
    one, eight = (read.step.step_ps(batch, 100 * batch) / PS_PER_S for batch in (1, 8))
    assert 1e-5 < one <= eight < 1
    for line in text.splitlines():
        cells = line.split()
        if len(cells) >= 8 and cells[7].endswith("%") and cells[0].isdigit():
            measured, predicted = float(cells[5]), float(cells[6])
            assert measured / 10 < predicted < measured * 10, line
