"""``oserve profile show`` and ``list`` on made-up profiles."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.profile_table import tokens
from shared.cost.estimate import estimate
from shared.cost.files import write_gpu, write_profile
from shared.cost.memory import kv_capacity_tokens
from shared.cost.model import replica_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from tests.support.costs import large_gpu, large_profile, small_gpu, small_profile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for gpu, profile in ((large_gpu(), large_profile()), (small_gpu(), small_profile())):
        write_profile(tmp_path / gpu.gpu / f"{profile.model}.toml", profile)
        write_gpu(tmp_path / gpu.gpu / "gpu.toml", gpu)
    return tmp_path


def oserve(*words: str, folder: Path) -> Result:
    return CliRunner().invoke(app, ["profile", *words, "--profiles", str(folder)])


def shown(*words: str, folder: Path) -> Any:
    answer = oserve("show", "--gpu", "big", "--model", "seventy", *words, "--json", folder=folder)
    assert answer.exit_code == 0, answer.exception
    return json.loads(answer.stdout)


def test_json_holds_what_the_model_predicts(folder: Path) -> None:
    """Scripts would read figures that are not those of the planner."""
    found = shown(
        "--shape", "tp4", "--batch", "1,16", "--input", "500", "--output", "50", folder=folder
    )
    model = replica_model(large_profile(), large_gpu(), Parallelism(tp=4))
    for one, batch in zip(found["estimates"], (1, 16), strict=True):
        right = estimate(model, batch=batch, input_tokens=500, output_tokens=50)
        assert (one["batch"], one["step_s"]) == (batch, right.step_s)
        assert (one["ttft_s"], one["itl_s"]) == (right.ttft_s, right.itl_s)
        assert one["requests_per_s"] == right.requests_per_s
    assert found["kv_tokens"] == model.kv_tokens
    assert found["start_s"] == model.start_s
    assert found["error"]["itl_p90"] == 0.15
    assert found["batches"] == [1, 16]
    assert found["steps_s"][1][0] == model.step.step_ps(16, 16 * 512) / 1e12


def test_room_that_is_not_there_is_left_out(folder: Path) -> None:
    """A table would promise steps for more context than the KV cache holds."""
    found = shown("--shape", "tp2", "--batch", "1,64", folder=folder)  # 39,070 tokens
    assert found["steps_s"][0][-1] is not None
    assert found["steps_s"][1][1:] == [None, None, None]
    assert [one["fits"] for one in found["estimates"]] == [True, False]


def test_nodes_and_stages_may_be_chosen(folder: Path) -> None:
    """A shape of 16 GPUs would be priced as if all of them sat in one node of 8."""
    assert shown("--shape", "tp8pp2", folder=folder)["nodes"] == 2
    far = shown("--shape", "tp4pp2", "--nodes", "2", "--stages", "50,30", folder=folder)
    near = shown("--shape", "tp4pp2", folder=folder)
    assert (far["nodes"], far["stages"]) == (2, [50, 30])
    assert (near["nodes"], near["stages"]) == (1, [40, 40])
    assert far["estimates"][-1]["step_s"] > near["estimates"][-1]["step_s"]
    assert far["kv_tokens"] < near["kv_tokens"]


def test_the_table_tells_what_matters(folder: Path) -> None:
    """Someone who asks would have to ask again: capacity, weights, start-up, error, batch."""
    answer = oserve("show", "--gpu", "big", "--model", "seventy", "--shape", "tp4", folder=folder)
    assert answer.exit_code == 0
    for text in ("499,133 tokens", "34.5 GB of 85.9", "53.1 s", "made up", "│   256 │", "254"):
        assert text in answer.stdout


def test_a_picture_is_drawn(folder: Path) -> None:
    """The picture would be missing, empty, or of another kind than its name says."""
    pytest.importorskip("matplotlib")
    path = folder / "picture.png"
    oserve(
        "show", "--gpu", "big", "--model", "seventy", "--shape", "tp4", "--picture", str(path),
        folder=folder,
    )  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--shape", "tp1"), "parallelism"),
        (("--shape", "tp3"), "parallelism"),
        (("--shape", "four"), "parallelism"),
        (("--shape", "tp4", "--batch", "1,x"), "batch"),
        (("--shape", "tp4", "--batch", "0"), "batch"),
        (("--shape", "tp4", "--input", "0"), "input"),
        (("--shape", "tp4", "--output", "-5"), "output"),
        (("--shape", "tp4pp2", "--stages", "1,2"), "stages"),
        (("--shape", "tp4", "--nodes", "9"), "nodes"),
        (("--shape", "tp4", "--picture", "x.gif"), "picture"),
    ],
)
def test_wrong_questions_name_their_field(words: tuple[str, ...], field: str, folder: Path) -> None:
    """A typing error would end in a stack, or in figures for something else."""
    answer = oserve("show", "--gpu", "big", "--model", "seventy", *words, folder=folder)
    assert isinstance(answer.exception, ConfigInvalid)
    assert answer.exception.field == field


def test_the_list_has_every_shape_that_fits(folder: Path) -> None:
    """Someone would buy GPUs that do not hold the model."""
    answer = oserve("list", "--json", folder=folder)
    rows = {(row["gpu"], row["model"]): row["kv_tokens"] for row in json.loads(answer.stdout)}
    seventy = rows["big", "seventy"]
    assert "tp1pp1" not in seventy
    assert seventy["tp4pp2"] == kv_capacity_tokens(
        large_profile(), large_gpu(), Parallelism(tp=4, pp=2)
    )
    assert set(rows["toy", "small"]) == {f"tp{tp}pp{pp}" for tp in (1, 2) for pp in (1, 2, 4)}
    table = oserve("list", "--gpu", "toy", folder=folder).stdout
    assert "small" in table
    assert "seventy" not in table
    nothing = oserve("list", "--gpu", "none", folder=folder)
    assert isinstance(nothing.exception, ConfigInvalid)


def test_counts_are_shown_in_three_digits() -> None:
    """A column of capacities would not be read at a glance."""
    assert [tokens(n) for n in (324, 9_999, 39_070, 499_133, 999_900, 1_419_258, 12_345_678)] == [
        "324", "9,999", "39.1k", "499k", "1M", "1.42M", "12.3M",
    ]  # fmt: skip
