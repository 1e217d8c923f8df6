"""``oserve up`` as an operator runs it: a process, its output, its signals."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT_S = 45.0
TOPOLOGY = """
[mesh]
name = "test"

[mesh.model]
model_id = "modelled"

[mesh.engine.modelled]
start_s = 0.01

[[mesh.nodes]]
node_id = "n0"
gpus = 2

[[mesh.replicas]]
replica_id = "r0"

[[mesh.replicas]]
replica_id = "r1"

[up]
http_port = 0
routers = 1
data_dir = "{folder}/data"
"""


def write_topology(folder: Path, extra: str = "") -> Path:
    """Two modelled replicas, any free port, a data folder of the test's own."""
    file = folder / "mesh.toml"
    file.write_text(TOPOLOGY.format(folder=folder) + extra, encoding="utf-8")
    return file


def oserve(*arguments: str, timeout_s: float = 45.0) -> subprocess.CompletedProcess[str]:
    """One ``oserve`` command, run to its end."""
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=_environ()
    )


class Up:
    """A running ``oserve up``; killed with everything it started when the test ends."""

    def __init__(self, topology: Path, *arguments: str) -> None:
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, "-m", "deploy.cli", "up", "-t", str(topology), *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environ(),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for(self, text: str, *, timeout_s: float = START_TIMEOUT_S) -> str:
        """The first line from now on that holds ``text``."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline_s - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line with {text!r} in:\n{self.output}")
            if text in line:
                return line

    def url(self) -> str:
        return self.wait_for("The mesh serves at").split()[-1]

    def interrupt(self) -> None:
        """What Ctrl-C does to the supervisor."""
        self.process.send_signal(signal.SIGINT)

    def exit_code(self, *, timeout_s: float = 45.0) -> int:
        code = self.process.wait(timeout=timeout_s)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            self._lines.put(line)
        self._lines.put(None)


def complete(url: str, *, tokens: int = 4, timeout_s: float = 30.0) -> dict[str, Any]:
    """One completion of ``tokens`` tokens, as any HTTP client would ask for it."""
    body = {"model": "modelled", "prompt": "hello", "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(  # noqa: S310  # our own server
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310  # same
        return json.load(answer)


def alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_gone(pids: list[int], *, timeout_s: float = 10.0) -> None:
    """Return once none of ``pids`` runs."""
    deadline_s = time.monotonic() + timeout_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline_s, f"still running: {left}"
        time.sleep(0.02)


def _environ() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
