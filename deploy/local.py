"""The mesh on one machine: the embedded broker and every service, supervised.

    async with LocalMesh(Path("deploy/topologies/modelled.toml"), port=0) as mesh:
        ...  # mesh.url serves; mesh.kill("router-0") is mended by itself

Used by ``oserve up``, the demo, and the tests that kill things.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy import broker
from deploy.config import Topology, load_topology
from deploy.logs import RotatingLog
from deploy.model import ModelNotMade, is_checkpoint, make_model
from deploy.ports import free_port, require_free
from deploy.probe import not_ready
from deploy.process import Exit, ProcessSpec, SupervisedProcess
from deploy.services import STOP_ORDER, service_specs
from deploy.state import DataDirLock, MeshFile, remove_mesh_file, write_mesh_file
from shared.errors import BusUnavailable, OServeError
from shared.service import EXIT_CONFIG, EXIT_UNAVAILABLE

_KILL_GRACE_S = 5.0


class MeshFailed(OServeError):
    """The mesh cannot run; ``exit_code`` is what the command line ends with."""

    def __init__(self, text: str, *, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(text)


def _silent(_text: str) -> None:
    return


class LocalMesh:
    """All processes of one mesh. ``say`` is told, in words, what happens to them."""

    def __init__(
        self,
        topology: Path | Topology,
        *,
        overrides: Sequence[str] = (),
        data_dir: Path | None = None,
        port: int | None = None,
        log_dir: Path | None = None,
        say: Callable[[str], None] = _silent,
    ) -> None:
        """``overrides`` are ``section.key=value``; ``port`` 0 takes any free one, None the
        topology's. Raises ConfigInvalid."""
        if isinstance(topology, Path):
            topology = load_topology(topology, overrides)
        self.topology = topology
        self.data_dir = data_dir or topology.data_dir
        self.log_dir = log_dir or self.data_dir / "logs"
        self.bus_url = "" if topology.broker_embedded else topology.bus.url
        self.processes: dict[str, SupervisedProcess] = {}
        self._port = topology.http_port if port is None else port
        self._ports: tuple[int, ...] = ()
        self._say = say
        self._lock = DataDirLock(self.data_dir)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[MeshFailed] | None = None

    @property
    def url(self) -> str:
        """Where the first ingress listens."""
        return f"http://{_bracketed(self.topology.http_host)}:{self._ports[0]}"

    def pids(self) -> dict[str, int]:
        """Process ids by name, of what runs at this moment."""
        found = {name: process.pid for name, process in self.processes.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process; the supervisor restarts it if it dies of that."""
        if name not in self.processes:
            raise KeyError(f"no process {name}; there are {', '.join(self.processes)}")
        self.processes[name].send(number)

    async def __aenter__(self) -> Self:
        await self.start()
        try:
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Check what can be checked, then start the broker and every service.

        Raises ConfigInvalid before anything runs, MeshFailed afterwards (nothing runs then).
        """
        self._lock.acquire()
        try:
            self._ports = self._choose_ports()
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self._failed = asyncio.get_running_loop().create_future()
            await self._make_models()
            await self._start_broker()
            specs = service_specs(
                self.topology, bus_url=self.bus_url, http_ports=self._ports, environ=os.environ
            )
            for spec in specs:
                self._supervise(spec)
            self._write_mesh_file()
        except BaseException:
            await self.stop()
            raise

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return once every ingress says ``/ready``; raises MeshFailed with what is missing."""
        assert self._failed is not None
        limit_s = self.topology.up.ready_timeout_s if timeout_s is None else timeout_s
        deadline_s = asyncio.get_running_loop().time() + limit_s
        causes = ["not asked yet"]
        while causes:
            if self._failed.done():
                raise self._failed.result()
            host = self.topology.http_host
            asked = [await not_ready(host, port) for port in self._ports]
            causes = [cause for cause in asked if cause]
            if causes and asyncio.get_running_loop().time() >= deadline_s:
                text = f"not ready after {limit_s:g} s: {causes[0]}{self._down()}"
                raise MeshFailed(f"{text}; logs: {self.log_dir}", exit_code=EXIT_UNAVAILABLE)
            if causes:
                await asyncio.sleep(0.05)

    async def failed(self) -> MeshFailed:
        """Returns only when the mesh cannot go on."""
        assert self._failed is not None
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Drain in order; what does not end in time is killed. Idempotent."""
        if not self._lock.held:
            return
        for stage in STOP_ORDER:
            await self._stop_stage(
                [name for name, p in self.processes.items() if p.spec.role in stage]
            )
        for process in self.processes.values():
            process.log.close()
        self.processes.clear()
        remove_mesh_file(self.data_dir)
        self._lock.release()

    def kill_all(self) -> None:
        """No drain, no order: for the operator's second Ctrl-C."""
        for process in self.processes.values():
            process.stop(signal.SIGKILL)

    def _choose_ports(self) -> tuple[int, ...]:
        """One port per ingress, all checked to be free before anything starts."""
        up, host = self.topology.up, self.topology.http_host
        if up.broker_port and self.topology.broker_embedded:
            require_free(
                "127.0.0.1", up.broker_port, field="up.broker_port", remedy="use 0 for any free one"
            )
        if self._port == 0:
            return tuple(free_port(host) for _ in range(up.ingresses))
        ports = tuple(range(self._port, self._port + up.ingresses))
        for port in ports:
            remedy = f"stop that, or serve elsewhere: oserve up --port {port + 1}"
            require_free(host, port, field="HTTP port", remedy=remedy)
        return ports

    async def _make_models(self) -> None:
        """A first start needs checkpoints: the topology may ask us to make them."""
        size = self.topology.up.make_model
        for path in dict.fromkeys(model.path for model in self.topology.mesh.models):
            if not size or not path or is_checkpoint(Path(path)):
                continue
            what = f"making a {size} checkpoint with random weights at {path}"
            self._say(f"{what} (first start only)")
            try:
                await make_model(Path(path), size)
            except ModelNotMade as error:
                raise MeshFailed(str(error), exit_code=EXIT_CONFIG) from None

    async def _start_broker(self) -> None:
        up = self.topology.up
        timeout_s = self.topology.bus.connect_timeout_s
        if self.topology.broker_embedded:
            port = up.broker_port or free_port()
            self.bus_url = f"nats://127.0.0.1:{port}"
            command = broker.command(port=port, store=self.data_dir.resolve() / "broker")
            self._supervise(ProcessSpec(name="broker", role="broker", command=command))
            timeout_s = up.broker_timeout_s
        try:
            info = await broker.wait_for_broker(self.bus_url, timeout_s=timeout_s)
        except BusUnavailable as error:
            words = self.processes["broker"].log.tail() if self.processes else []
            text = "; ".join([str(error), *words[-3:]])
            raise MeshFailed(text, exit_code=EXIT_UNAVAILABLE) from None
        if not info.jetstream:
            text = f"the broker at {self.bus_url} runs without JetStream: start it with -js"
            raise MeshFailed(text, exit_code=EXIT_UNAVAILABLE)
        if info.max_payload < broker.PAYLOAD_BYTES_MIN:
            self._say(
                f"warning: the broker's max_payload is {info.max_payload} bytes, so long prompts "
                f"will be refused; set {broker.PAYLOAD_BYTES_MIN} or more"
            )

    def _supervise(self, spec: ProcessSpec) -> None:
        up = self.topology.up
        log = RotatingLog(
            self.log_dir / f"{spec.name}.log",
            bytes_max=up.log_bytes_max,
            files_max=up.log_files_max,
        )
        process = SupervisedProcess(spec, log=log, up=up, on_exit=self._on_exit, say=self._say)
        self.processes[spec.name] = process
        task = asyncio.create_task(process.run(), name=spec.name)
        task.add_done_callback(self._on_supervision_ended)
        self._tasks[spec.name] = task

    def _on_exit(self, ended: Exit) -> None:
        if ended.restart_in_s is not None:
            self._say(str(ended))
            return
        self._fail(MeshFailed(str(ended), exit_code=ended.code))

    def _on_supervision_ended(self, task: asyncio.Task[None]) -> None:
        """Supervision itself fails when the machine is out of processes or files."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            text = f"cannot supervise {task.get_name()}: {error!r}"
            self._fail(MeshFailed(text, exit_code=EXIT_UNAVAILABLE))

    def _fail(self, failure: MeshFailed) -> None:
        assert self._failed is not None
        if not self._failed.done():
            self._failed.set_result(failure)

    async def _stop_stage(self, names: list[str]) -> None:
        tasks = [self._tasks.pop(name) for name in names if name in self._tasks]
        for name in names:
            self.processes[name].stop()
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self.topology.up.stop_timeout_s)
        for task in late:
            self._say(f"{task.get_name()} did not end in time: killed")
            self.processes[task.get_name()].send(signal.SIGKILL)
        if late:
            await asyncio.wait(late, timeout=_KILL_GRACE_S)
        await asyncio.gather(*tasks, return_exceptions=True)  # failures were told by then

    def _down(self) -> str:
        down = [name for name, process in self.processes.items() if process.pid is None]
        if not down:
            return ""
        return f"; not running: {', '.join(down)}"

    def _write_mesh_file(self) -> None:
        content = MeshFile(
            name=self.topology.mesh.name,
            pid=os.getpid(),
            url=self.url,
            bus_url=self.bus_url,
            topology=str(self.topology.file.resolve()),
            log_dir=str(self.log_dir.resolve()),
            started_unix_s=time.time(),
        )
        write_mesh_file(self.data_dir, content)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
