"""``oserve simulate`` from its command line to what it prints."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from loadgen.simulator.cli import simulate

TOPOLOGY = """
[mesh.model]
model_id = "m"
[mesh.engine.modelled]
start_s = 1.0
[[mesh.nodes]]
node_id = "n0"
gpus = 2
gpu_kind = "modelled"
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
"""


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    (tmp_path / "two.toml").write_text(TOPOLOGY)
    return tmp_path / "two.toml"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [f"{0.5 * number},{100 + number},{20 + number % 7}" for number in range(60)]
    (tmp_path / "t.csv").write_text(
        "\n".join(["timestamp_s,input_tokens,output_tokens", *rows]) + "\n"
    )
    return tmp_path / "t.csv"


def oserve(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(simulate)
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


def words(result: Result) -> str:
    return " ".join(result.stderr.split())


def test_a_run_prints_its_figures(topology: Path, trace: Path) -> None:
    """Users would have to run a cluster to learn what a trace does to it."""
    result = oserve(trace, "-t", topology)
    assert result.exit_code == 0, result.stderr
    assert "60 offered, 60 completed" in result.stdout
    assert "TTFT" in result.stdout
    first, again, other = (
        json.loads(oserve(trace, "-t", topology, "--json", *more).stdout)
        for more in ((), (), ("--rate-scale", "0.5", "--seed", "3"))
    )
    assert first["offered"] == first["completed"] == 60
    assert first["digest"] == again["digest"] != other["digest"]
    assert 10 < other["offered"] < 50
    assert first["ttft_ms"]["p99"] >= first["ttft_ms"]["p50"] > 0


def test_an_incident_of_the_command_line_happens(topology: Path, trace: Path) -> None:
    """The option would be there, and do nothing."""
    calm, struck, late = (
        json.loads(oserve(trace, "-t", topology, "--json", *more).stdout)
        for more in (
            (),
            ("--incident", "crash:n0-g0@10+5", "--incident", "crash:n0-g1@10+5"),
            ("--incident", "crash:n0-g0@9999+5"),
        )
    )
    assert struck["completed"] == 60
    assert struck["ttft_ms"]["p99"] > calm["ttft_ms"]["p99"] + 1000
    assert late["notes"] == ["crash of n0-g0 at 9999 s never came: all had ended before"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "best"), "policy = 'best': use one of: static-<shape>, static,"),
        (("--policy", "static-tp3x"), "policy"),
        (("--policy", "static-tp16"), "tp16"),
        (("--policy", "static@never"), "@oracle"),
        (("--forecast", "never"), "forecast"),
        (("--incident", "crash:gpu7@1+1"), "gpu7 is none of the GPUs n0-g0, n0-g1"),
        (("--class", "urgent"), "class"),
        (("--start", "1e9"), "its requests begin at 0 s and end at 29.5 s"),
        (("--rate-scale", "0"), "rate_scale"),
        (("--duration", "-5"), "duration"),
        (("--drain", "-1"), "drain"),
        (("--network-ms", "-1"), "network-ms"),
        (("--slow-work", "-1"), "slow-work"),
        (("--output-limit", "0"), "output-limit"),
    ],
)
def test_wrong_options_are_named(
    topology: Path, trace: Path, arguments: tuple[str, ...], said: str
) -> None:
    """A typing error would become a trace of Python, or a run of something else."""
    result = oserve(trace, "-t", topology, *arguments)
    assert result.exit_code in (1, 2), result.stdout
    assert said in words(result), words(result)
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timestamp_s,input_tokens,output_tokens\n1.0,ten,5\n", "line 2"),
        ("timestamp_s,input_tokens\n1.0,10\n", "output_tokens"),
        ("", "holds no requests"),
    ],
    ids=["not-a-number", "no-column", "empty"],
)
def test_a_bad_trace_is_named_with_its_place(
    topology: Path, tmp_path: Path, text: str, said: str
) -> None:
    """The user would search a file of a million lines."""
    path = tmp_path / "bad.csv"
    path.write_text(text)
    result = oserve(path, "-t", topology)
    assert result.exit_code in (1, 2)
    assert "bad.csv" in words(result), words(result)
    assert said in words(result), words(result)


def test_what_is_not_there_is_named(topology: Path, trace: Path, tmp_path: Path) -> None:
    """A missing file would be a trace of Python."""
    for arguments in ((tmp_path / "no.csv", "-t", topology), (trace, "-t", tmp_path / "no.toml")):
        result = oserve(*arguments)
        assert result.exit_code in (1, 2)
        assert "no." in words(result), words(result)
        assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("gpus = 2", "gpus = 0", "mesh.nodes.n0.gpus"),
        ("gpus = 2", "gpu = 2", "gpu"),
        ('replica_id = "r1"', 'replica_id = "r0"', "mesh.replicas.replica_id"),
        ("start_s = 1.0", 'timing = "profile"', "gpu_kind"),
        ("start_s = 1.0", "kv_blocks = 0", "kv_blocks"),
        ("[mesh.engine.modelled]", '[mesh.engine]\nkind = "torch"\n[mesh.engine.modelled]', "path"),
    ],
    ids=["no-gpus", "unknown-field", "same-id", "no-profile", "no-memory", "not-modelled"],
)
def test_a_bad_topology_is_named_with_its_field(
    topology: Path, trace: Path, before: str, after: str, said: str
) -> None:
    """The user would not know which line to mend."""
    topology.write_text(TOPOLOGY.replace(before, after))
    result = oserve(trace, "-t", topology)
    assert result.exit_code == 2, (result.stdout, result.exception)
    assert said in words(result), words(result)


def test_a_model_needs_a_profile_or_a_place_in_the_topology(topology: Path, trace: Path) -> None:
    """A name that nobody knows would be served by something else."""
    profiled = TOPOLOGY.replace("start_s = 1.0", 'timing = "profile"')
    topology.write_text(profiled.replace('gpu_kind = "modelled"', 'gpu_kind = "h100"'))
    result = oserve(trace, "-t", topology, "--model", "gpt-17")
    assert result.exit_code == 2
    assert "gpt-17" in words(result), words(result)
    pairs = oserve(f"m={trace}", "-t", topology, "--model", "m")
    assert pairs.exit_code == 2
    assert "pairs name their models" in words(pairs)
