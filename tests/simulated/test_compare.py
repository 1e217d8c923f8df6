"""A small comparison from the command line to its files, with the real simulator."""

import random
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from loadgen.compare.asked import mesh_of
from loadgen.compare.assemble import compared
from loadgen.compare.cli import compare
from loadgen.compare.jobs import Runs
from loadgen.compare.options import Options
from loadgen.compare.outcome import Comparison
from loadgen.compare.saturation import TOLERANCE

WINDOW_S = 30.0
TOPOLOGY = """
[mesh.model]
model_id = "m"
[mesh.engine.modelled]
prefill_token_s = 0.00004
start_s = 1.0
kv_blocks = 1024
running_max = 32
[[mesh.nodes]]
node_id = "n0"
gpus = 2
gpu_kind = "modelled"
"""


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    (tmp_path / "two.toml").write_text(TOPOLOGY)
    return tmp_path / "two.toml"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """About four requests a second: short chats, and long prompts with short answers."""
    rng = random.Random(5)
    at_s, rows = 0.0, ["timestamp_s,input_tokens,output_tokens,label"]
    while (at_s := at_s + rng.expovariate(4.0)) < WINDOW_S:
        chat = rng.random() < 0.5
        lengths = (rng.randint(50, 400), rng.randint(40, 120)) if chat else (2000, 10)
        rows.append(f"{at_s:.3f},{lengths[0]},{lengths[1]},{'chat' if chat else 'doc'}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "t.csv"


def options_of(trace: Path, *policies: str, **changes: object) -> Options:
    options = Options(
        traces={"": str(trace)}, policies=policies, loads=(0.7, 1.3), seeds=2,
        reference=policies[0], duration_s=WINDOW_S, drain_s=60.0, slow_work_s=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(options, **changes).checked()


@pytest.mark.timeout(180)
def test_load_one_is_where_the_best_static_deployment_gives_up(
    topology: Path, trace: Path, tmp_path: Path
) -> None:
    """The loads of every comparison would be shares of something else; and pairs would differ in
    their arrivals."""
    options = options_of(trace, "static-best", "oserve", candidates=2)
    mesh = mesh_of(topology, "", options.traces)
    runs = Runs(tmp_path / "runs")
    found = compared(options, mesh, runs=runs, topology="two.toml", command="here")
    saturation = found.saturation
    assert saturation.rate_scale < saturation.rate_scale_above
    assert saturation.rate_scale_above <= saturation.rate_scale * (1 + TOLERANCE)
    assert saturation.deployment in found.deployments
    calm, busy = found.cell("static-best", 0.7), found.cell("static-best", 1.3)
    assert calm.runs[0].slo_attainment > 0.9 > busy.runs[0].slo_attainment
    for load in (0.7, 1.3):
        offered = [[run.offered for run in found.cell(p, load).runs] for p in options.policies]
        assert offered[0] == offered[1]
    assert runs.done > 10

    again = Runs(tmp_path / "runs")
    repeated = compared(options, mesh, runs=again, topology="two.toml", command="here")
    assert again.done == 0
    assert repeated.cells == found.cells


@pytest.mark.timeout(180)
def test_two_models_share_the_gpus(topology: Path, trace: Path, tmp_path: Path) -> None:
    """With several models, where moving GPUs pays most, the reference would not exist, or one
    model would have no replica."""
    text = topology.read_text().replace("gpus = 2", "gpus = 3")
    topology.write_text(text + '[[mesh.more_models]]\nmodel_id = "n"\n')
    options = options_of(
        trace, "static-best", "static-default", "llumnix",
        traces={"m": str(trace), "n": str(trace)}, loads=(0.5,), seeds=1, candidates=3,
        saturation_scale=1.0,
    )  # fmt: skip
    mesh = mesh_of(topology, "", options.traces)
    runs = Runs(tmp_path / "runs")
    found = compared(options, mesh, runs=runs, topology="three.toml", command="here")
    assert len(found.deployments) == 3
    assert all(" m tp" in name and " n tp" in name for name in found.deployments)
    assert set(found.targets) == {"m/chat", "m/doc", "n/chat", "n/doc"}
    (run,) = found.cell("static-best", 0.5).runs
    assert {key: entry.offered > 0 for key, entry in run.types.items()} == dict.fromkeys(
        found.targets, True
    )
    assert run.types["m/chat"].offered != run.types["n/chat"].offered  # thinned by unlike draws
    assert run.completed_share == 1.0


@pytest.mark.timeout(180)
def test_command_line(topology: Path, trace: Path, tmp_path: Path) -> None:
    """What users call would fail where its parts work; with two processes, not even that."""
    app = typer.Typer()
    app.command()(compare)
    folder = tmp_path / "report"
    arguments = [
        str(trace), "-t", str(topology), "--report", str(folder), "--seeds", "1", "--load", "0.5",
        "--saturation", "2", "--policies", "static-tp1,llumnix,static-default", "--jobs", "2",
        "--slo", "relative:5", "--candidates", "1", "--slow-work", "0", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode(done.stdout, type=Comparison)
    assert found == msgspec.json.decode((folder / "comparison.json").read_bytes(), type=Comparison)
    assert set(found.targets) == {"m/chat", "m/doc"}
    assert found.targets["m/doc"].ttft_s > found.targets["m/chat"].ttft_s
    assert found.reference == "static-tp1"
    assert found.cell("static-default", 0.5).deployment == "2 tp1"
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# Comparison")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--load", "1:0:1"], "load"),
        (["--policies", "best"], "static-<shape>"),
        (["--reference", "oserve"], "reference"),
        (["--start", "900"], "no request between"),
        (["--policies", "static-best,static-tp8"], "use one of: tp1"),
        (["--policies", "static"], "mesh.replicas"),
        (["--slo", "strict"], "slo"),
        (["--warmup", "99", "--duration", "20"], "warmup"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    topology: Path, trace: Path, tmp_path: Path, changed: list[str], said: str
) -> None:
    """A typing mistake would end in a traceback, or after hours of simulation."""
    app = typer.Typer()
    app.command()(compare)
    good = ["-t", str(topology), "--report", str(tmp_path / "r"), "--policies", "static-tp1"]
    done = CliRunner().invoke(app, [str(trace), *good, "--saturation", "1", *changed])
    assert done.exit_code in (1, 2)
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "r" / "runs").exists()
