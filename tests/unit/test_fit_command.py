"""`oserve fit` and `oserve profile validate`: their options reach the profiler's own command."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy import fit
from deploy.cli import app


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of each child process; each ends with status 3."""
    calls: list[list[str]] = []

    def run_profiler(arguments: list[str]) -> int:
        calls.append(list(arguments))
        return 3

    monkeypatch.setattr(fit, "run_profiler", run_profiler)
    return calls


def test_options_of_fit(asked: list[list[str]]) -> None:
    """A model would be fitted on GPUs, or from tables, that nobody asked for."""
    words = ["fit", "--model", "m", "--gpu", "h100", "--gpu", "l40s", "--out", "o"]
    done = CliRunner().invoke(app, [*words, "--tables", "t", "--name", "n"])
    assert done.exit_code == 3
    wanted = ["fit", "--out", "o", "--gpu", "h100", "--gpu", "l40s"]
    assert asked == [[*wanted, "--model", "m", "--tables", "t", "--name", "n"]]


def test_options_of_validate(asked: list[list[str]]) -> None:
    """A program would get a table for people."""
    assert CliRunner().invoke(app, ["profile", "validate"]).exit_code == 3
    CliRunner().invoke(app, ["profile", "validate", "--tables", "t", "--json"])
    assert asked == [["validate"], ["validate", "--tables", "t", "--json"]]


def test_the_child_says_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its error, or its status, would be lost between the two processes."""
    assert fit.run_profiler(["fit", "--model", str(tmp_path)]) == 78
    assert str(tmp_path / "config.json") in capfd.readouterr().err


def test_interruption_is_the_usual_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C would end in a stack trace."""

    def interrupted(command: tuple[str, ...], **_: object) -> None:
        assert command == (sys.executable, "-m", "services.profiler", "validate")
        raise KeyboardInterrupt

    monkeypatch.setattr(fit.subprocess, "run", interrupted)
    assert fit.run_profiler(["validate"]) == 130
