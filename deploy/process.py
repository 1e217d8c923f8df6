"""One supervised process: started, its output kept, restarted when it dies."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deploy.config import UpConfig
from deploy.logs import RotatingLog, last_words
from shared.service import EXIT_CONFIG

_CHILD = str(Path(__file__).with_name("child.py"))
_CHUNK_BYTES = 1 << 16
_OUTPUT_GRACE_S = 1.0  # for what a dead process left in its pipe

Role = Literal["broker", "control", "deciding", "worker", "ingress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """What to run. ``role`` decides when it is stopped."""

    name: str
    role: Role
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A process ended by itself. ``restart_in_s`` is None when restarting would not help."""

    name: str
    code: int  # negative: the signal that killed it
    words: str
    restart_in_s: float | None

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        if self.restart_in_s is None:
            return f"{self.name} ended with {how}: {self.words}"
        return f"{self.name} ended with {how}, restarting in {self.restart_in_s:.1f} s"


class SupervisedProcess:
    """Keeps ``spec`` running until told to stop.

    The child leads a session of its own, so that the terminal's Ctrl-C reaches only the
    supervisor, which then drains everything in order; and it dies with the supervisor.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        log: RotatingLog,
        up: UpConfig,
        on_exit: Callable[[Exit], None],
        say: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.log = log
        self._up = up
        self._on_exit = on_exit
        self._say = say
        self._log_failed = False
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Its process id; None between a death and the restart."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def send(self, number: int) -> bool:
        """Send a signal; False if nothing runs. The supervision goes on."""
        process = self._process
        if process is None or process.returncode is not None:
            return False
        process.send_signal(number)
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it for good: ``run`` returns once the process has ended."""
        self._stopping.set()
        self.send(number)

    async def run(self) -> None:
        """Start, wait, restart; returns after ``stop``, or when restarting would not help."""
        loop = asyncio.get_running_loop()
        up = self._up
        backoff_s = up.restart_backoff_s
        while not self._stopping.is_set():
            started_s = loop.time()
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if loop.time() - started_s >= up.restart_stable_s:
                backoff_s = up.restart_backoff_s
            final = code == EXIT_CONFIG
            words = last_words(self.log.tail())
            self._on_exit(
                Exit(
                    name=self.spec.name,
                    code=code,
                    words=words,
                    restart_in_s=None if final else backoff_s,
                )
            )
            if final:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, up.restart_backoff_s_max)

    async def _run_once(self) -> int:
        self.log.forget_tail()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", _CHILD, str(os.getpid()), *self.spec.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **self.spec.environ},
            start_new_session=True,
        )
        self._process = process
        assert process.stdout is not None
        if self._stopping.is_set():  # told to stop while it was being started
            process.terminate()
        output = asyncio.create_task(self._keep_output(process.stdout))
        try:
            code = await process.wait()
            await asyncio.wait((output,), timeout=_OUTPUT_GRACE_S)
        finally:
            if process.returncode is None:  # we are cancelled: nothing may outlive us
                process.kill()
            output.cancel()
        return code

    async def _keep_output(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(_CHUNK_BYTES):
            try:
                self.log.write(chunk)
            except OSError as error:
                # The disk is full, as a rule. The pipe must be emptied all the same, or the
                # process would block on it: a mesh without logs beats none.
                if not self._log_failed:
                    self._say(f"{self.spec.name}: cannot write its log: {error}")
                self._log_failed = True
