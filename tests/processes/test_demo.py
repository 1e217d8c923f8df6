"""The demo, on a machine that has nothing but the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.torch, pytest.mark.timeout(240)]


def test_the_demo_loses_no_request_in_two_switches_and_a_crash(tmp_path: Path) -> None:
    """It is the first thing that a visitor runs, and what it shows is what we promise."""
    environ = {**os.environ, "OSERVE_TRACES": str(tmp_path / "none"), "COLUMNS": "120"}
    answer = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "--duration", "10", "--out", "out"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=220,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "using the built-in workload" in answer.stdout
    assert "SIGKILL to worker-n0-g0" in answer.stdout
    assert "2 of 2 switches were live" in answer.stdout
    assert "every request completed" in answer.stdout
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["overall"]["completed"] == report["overall"]["offered"] > 0
    assert [mark["text"] for mark in report["marks"]] == [
        "switch to 1 x tp2",
        "switch to 2 x tp1",
        "SIGKILL worker-n0-g0",
    ]
    assert (tmp_path / "out/report.png").stat().st_size > 1000
