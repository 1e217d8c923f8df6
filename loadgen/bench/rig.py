"""A mesh of real processes pinned to cores, for the data-plane benchmark.

Engines share the core of the load client; broker, ingress, router and the control services have
the other one to themselves, so that what they use can be told apart.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, cast

import msgspec

from shared.mesh import MeshConfig

CONTROL = ("scheduler", "switcher", "profiler", "forecaster")
DATA_PLANE = ("nats", "router", "ingress")
READY_TIMEOUT_S = 30.0
TICK_MS = 1000.0 / os.sysconf("SC_CLK_TCK")


def _inline(value: Any) -> str:  # noqa: ANN401  # any TOML value
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        pairs = (f"{key} = {_inline(inner)}" for key, inner in table.items() if inner is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(inner) for inner in cast("list[Any]", value)) + "]"
    return msgspec.json.encode(value).decode()


def cores() -> tuple[set[int], set[int]]:
    """(client and engines, everything else): the first two cores that we may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[0]}, {allowed[-1]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rig:
    """Start with ``with``; everything is killed and removed at the end."""

    def __init__(
        self,
        *,
        engine: Mapping[str, float] = MappingProxyType({}),
        gpus: int = 2,
        log_requests: bool = True,
        mesh: MeshConfig | None = None,
        pinned: bool = True,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """``mesh``: this topology, in place of ``gpus`` small replicas of a modelled engine with
        the settings ``engine``. Not ``pinned``: every process may use every core."""
        self._ready_timeout_s = ready_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="oserve-bench-"))
        self._engine, self._gpus, self._mesh, self._pinned = engine, gpus, mesh, pinned
        self._broker_port, self.port = free_port(), free_port()
        self._level = "INFO" if log_requests else "WARNING"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[list[str], set[int]]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bus_url(self) -> str:
        return f"nats://127.0.0.1:{self._broker_port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> None:
        engine_core, mesh_core = cores()
        config = self._written_config()
        binary = Path(sys.executable).with_name("nats-server")
        broker = [str(binary) if binary.exists() else shutil.which("nats-server") or "nats-server"]
        broker += ["-c", str(self._folder / "nats.conf")]
        self._spawn("nats", broker, mesh_core)
        for name in ("ingress", "router", *CONTROL):
            # A router's instance decides which of equal replicas it begins with: always the same.
            command = [*self._service(name, config), "--instance", f"{name}-0"]
            self._spawn(name, command, mesh_core)
        for worker_id in self._worker_ids():
            command = [*self._service("worker", config), "--set", f"worker.worker_id={worker_id}"]
            self._spawn(f"worker-{worker_id}", command, engine_core)
        self._wait_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self, names: Iterable[str]) -> None:
        """Kill these processes, all at once, and start them anew as they were."""
        chosen = list(names)
        for name in chosen:
            self.processes[name].send_signal(signal.SIGKILL)
        for name in chosen:
            self.processes[name].wait()
        for name in chosen:
            self._spawn(name, *self._commands[name])

    def cpu_ms(self) -> dict[str, float]:
        """CPU time of each process so far, user and system."""
        used: dict[str, float] = {}
        for name, process in self.processes.items():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) * TICK_MS
        return used

    def rss_bytes(self, name: str) -> int:
        pages = Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _service(self, name: str, config: Path) -> list[str]:
        return [sys.executable, "-m", f"services.{name}", "--config", str(config)]

    def _spawn(self, name: str, command: list[str], core: set[int]) -> None:
        self._commands[name] = (command, core)
        with (self._folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        if self._pinned:
            os.sched_setaffinity(process.pid, core)
        self.processes[name] = process

    def _written_config(self) -> Path:
        store = self._folder / "store"
        (self._folder / "nats.conf").write_text(
            f'listen: "127.0.0.1:{self._broker_port}"\nmax_payload: 8MB\n'
            f'jetstream {{ store_dir: "{store}" }}\n'
        )
        path = self._folder / "bench.toml"
        path.write_text(
            f"{self._topology()}"
            f'[bus]\nurl = "{self.bus_url}"\n'
            f"[ingress]\nport = {self.port}\n"
            f'[telemetry]\nlog_level = "{self._level}"\n'
        )
        return path

    def _worker_ids(self) -> list[str]:
        if self._mesh is not None:
            return [gpu.gpu_id for gpu in self._mesh.gpus()]
        return [f"n0-g{gpu}" for gpu in range(self._gpus)]

    def _topology(self) -> str:
        if self._mesh is not None:
            # JSON's strings, numbers and lists are TOML's; an inline table holds the rest.
            return f"mesh = {_inline(msgspec.to_builtins(self._mesh))}\n"
        settings = "\n".join(f"{key} = {value}" for key, value in self._engine.items())
        nodes = f'[[mesh.nodes]]\nnode_id = "n0"\ngpus = {self._gpus}\n'
        replicas = "".join(
            f'[[mesh.replicas]]\nreplica_id = "r{i}"\ngpus = ["n0-g{i}"]\n'
            for i in range(self._gpus)
        )
        return (
            '[mesh]\nname = "bench"\nmodel = { model_id = "modelled", context_tokens_max = 8192 }\n'
            f'[mesh.engine]\nkind = "modelled"\n[mesh.engine.modelled]\n{settings}\n'
            f"{nodes}{replicas}"
        )

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline_s:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    log = (self._folder / f"{name}.log").read_text()[-2000:]
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{log}")
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=1) as answer:  # noqa: S310  # our own URL
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise RuntimeError(f"the mesh was not ready within {self._ready_timeout_s} s")
