"""The small commands of ``oserve``."""

import asyncio
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from deploy.model import ModelNotMade, make_model
from tests.support.up import oserve, write_topology

pytestmark = pytest.mark.processes


def test_help_names_every_command() -> None:
    """Whoever types `oserve` must see what there is."""
    answer = oserve("--help")
    assert answer.returncode == 0
    for name in ("up", "status", "doctor", "replay", "make-model", "keys", "version"):
        assert f"  {name} " in answer.stdout
    assert oserve("version").stdout.strip() == metadata.version("oserve")


def test_replay_has_its_own_help() -> None:
    """Its options are the load generator's, and none may be lost on the way."""
    answer = oserve("replay", "--help")
    assert answer.returncode == 0
    assert "--time-scale" in answer.stdout
    assert "oserve replay" in answer.stdout


def test_a_new_key_is_shown_apart_from_its_entry() -> None:
    """`oserve keys new >> keys.toml` must append the entry and nothing secret."""
    answer = oserve("keys", "new", "--tenant", "search", "--class", "batch")
    assert answer.returncode == 0
    (entry,) = tomllib.loads(answer.stdout)["keys"]
    assert (entry["tenant"], entry["slo_class"]) == ("search", "batch")
    assert answer.stderr.startswith("sk-oserve-")
    assert "sk-oserve-" not in answer.stdout
    assert oserve("keys", "new", "--tenant", "a b").returncode == 78


@pytest.mark.torch
def test_make_model_writes_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    """A first start must need no download, and half a checkpoint must not pass for one."""
    model = tmp_path / "model"
    assert oserve("make-model", str(model)).returncode == 0
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    again = oserve("make-model", str(model))
    assert again.returncode == 1
    assert "no empty folder" in again.stderr
    wrong = oserve("make-model", str(tmp_path / "other"), "--size", "vast")
    assert wrong.returncode == 1
    assert "'vast'" in wrong.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.torch
def test_an_interrupted_making_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C during the first start must not spoil the second."""

    async def run() -> None:
        making = asyncio.create_task(make_model(tmp_path / "model", "tiny"))
        await asyncio.sleep(0.05)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert not (tmp_path / "model").exists()
        await make_model(tmp_path / "model", "tiny")
        with pytest.raises(ModelNotMade):
            await make_model(tmp_path / "model", "tiny")

    asyncio.run(run())


def test_status_says_that_nothing_runs(tmp_path: Path) -> None:
    """A script must be able to tell by the exit code, a person by the text."""
    topology = str(write_topology(tmp_path))
    for where in (("-t", topology), ("--data-dir", str(tmp_path))):
        answer = oserve("status", *where)
        assert answer.returncode == 1
        assert "no mesh runs in" in answer.stderr
    answer = oserve("status", "--bus-url", "nats://127.0.0.1:1")
    assert answer.returncode == 1
    assert "127.0.0.1:1" in answer.stderr
