"""One supervised process: restarts, last words, signals, and a full disk."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.config import UpConfig
from deploy.logs import RotatingLog
from deploy.process import Exit, ProcessSpec, SupervisedProcess
from tests.support.up import alive, wait_gone

pytestmark = pytest.mark.processes

FAST = UpConfig(restart_backoff_s=0.01, restart_backoff_s_max=0.04)


async def _supervise(
    folder: Path, script: str, *, exits: int, up: UpConfig = FAST, log: Path | None = None
) -> tuple[list[Exit], list[str], SupervisedProcess]:
    """Run ``script`` under supervision until it has ended ``exits`` times, then stop it."""
    seen: list[Exit] = []
    said: list[str] = []
    enough = asyncio.Event()

    def on_exit(ended: Exit) -> None:
        seen.append(ended)
        if len(seen) >= exits:
            enough.set()

    process = SupervisedProcess(
        ProcessSpec(name="p", role="control", command=(sys.executable, "-c", script)),
        log=RotatingLog(log or folder / "p.log", bytes_max=10_000, files_max=1),
        up=up,
        on_exit=on_exit,
        say=said.append,
    )
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(20):
        await enough.wait()
        process.stop()
        await running
    process.log.close()
    return seen, said, process


def _restarts(exits: Sequence[Exit]) -> list[float | None]:
    return [ended.restart_in_s for ended in exits]


def test_restarts_become_rarer_up_to_a_bound(tmp_path: Path) -> None:
    """A service that dies at once must neither burn a core nor be given up."""
    exits, _, _ = asyncio.run(_supervise(tmp_path, "print('why'); exit(3)", exits=5))
    assert _restarts(exits) == [0.01, 0.02, 0.04, 0.04, 0.04]
    assert {(ended.code, ended.words) for ended in exits} == {(3, "why")}


def test_a_long_life_earns_a_quick_restart(tmp_path: Path) -> None:
    """The first crash in a month must not wait for the backoff of last month's."""
    up = UpConfig(restart_backoff_s=0.01, restart_stable_s=0.0)
    exits, _, _ = asyncio.run(_supervise(tmp_path, "exit(1)", exits=3, up=up))
    assert _restarts(exits) == [0.01, 0.01, 0.01]


def test_a_wrong_setting_is_not_restarted(tmp_path: Path) -> None:
    """Nothing changes a setting but its operator."""
    script = "import sys; print('{\"event\":\"x\"}'); sys.stderr.write('bad: a.b\\n'); exit(78)"
    exits, _, process = asyncio.run(_supervise(tmp_path, script, exits=1))
    assert [(e.code, e.words, e.restart_in_s) for e in exits] == [(78, "bad: a.b", None)]
    assert "p ended with exit code 78: bad: a.b" in str(exits[0])
    assert process.pid is None


def test_a_full_disk_does_not_stop_the_mesh(tmp_path: Path) -> None:
    """A process whose pipe nobody empties would block on its next log line."""
    log = tmp_path / "p.log"
    log.symlink_to("/dev/full")
    script = "print('x' * 1_000_000); exit(5)"  # far more than a pipe holds
    exits, said, _ = asyncio.run(_supervise(tmp_path, script, exits=2, log=log))
    assert [ended.code for ended in exits] == [5, 5]
    assert len(said) == 1, said
    assert "cannot write its log" in said[0]


def test_stop_is_sigterm_and_ends_the_supervision(tmp_path: Path) -> None:
    """What is told to drain must not be restarted when it has."""

    async def run() -> None:
        log = RotatingLog(tmp_path / "p.log", bytes_max=10_000, files_max=1)
        exits: list[Exit] = []
        script = (
            "import signal, sys, time\n"
            "def end(*_):\n"
            "    print('drained', flush=True)\n"
            "    sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n"
        )
        process = SupervisedProcess(
            ProcessSpec(name="p", role="control", command=(sys.executable, "-c", script)),
            log=log, up=FAST, on_exit=exits.append, say=print,
        )  # fmt: skip
        running = asyncio.create_task(process.run())
        async with asyncio.timeout(20):
            while log.tail() != ["ready"]:
                await asyncio.sleep(0.01)
            pid = process.pid
            assert pid is not None
            assert os.getsid(pid) == pid, "the terminal's Ctrl-C would reach it"
            process.stop()
            await running
        assert log.tail() == ["ready", "drained"]
        assert exits == []
        log.close()

    asyncio.run(run())


def test_a_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    """SIGKILL leaves a supervisor no chance to stop anything."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()}\\n'); time.sleep(60)"
    )
    runner = Path(__file__).parents[2] / "deploy/child.py"
    supervisor = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(runner)!r}, str(os.getpid()),\n"
        f"    sys.executable, '-c', {child!r}, {str(pid_file)!r}])\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", supervisor]) as process:
        deadline_s = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text(encoding="utf-8").endswith("\n")):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        pid = int(pid_file.read_text(encoding="utf-8"))
        assert alive(pid)
        process.send_signal(signal.SIGKILL)
    wait_gone([pid])


def test_a_child_of_a_dead_supervisor_does_not_start() -> None:
    """Between the supervisor's fork and the child's wish lies a moment in which it may die."""
    runner = Path(__file__).parents[2] / "deploy/child.py"
    answer = subprocess.run(
        [sys.executable, str(runner), "1", "echo", "started"],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert answer.returncode != 0
    assert "started" not in answer.stdout
    assert "the supervisor is gone" in answer.stderr
