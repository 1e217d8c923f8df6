"""``oserve up``: runs the mesh in the foreground until told to stop."""

import asyncio
import contextlib
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from deploy.config import STATE_DIR, Topology
from deploy.local import LocalMesh, MeshFailed
from shared.config import SECRETS

_KILLED = 130  # what shells say of a process that Ctrl-C ended


def run_up(
    topology: Path, *, overrides: Sequence[str], port: int | None, log_dir: Path | None
) -> int:
    """The exit code. Raises ConfigInvalid."""
    return asyncio.run(_Foreground(topology, overrides, port, log_dir).run())


class _Foreground:
    """One mesh and one terminal. The first Ctrl-C drains, the second kills."""

    def __init__(
        self, topology: Path, overrides: Sequence[str], port: int | None, log_dir: Path | None
    ) -> None:
        self._console = Console(highlight=False)
        self._mesh = LocalMesh(
            topology, overrides=overrides, port=port, log_dir=log_dir, say=self._say
        )
        self._asked = asyncio.Event()
        self._killed = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _signals():
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._until_asked(self._serve())
        except MeshFailed as failure:
            self._say(f"stopping: {failure}")
            await self._mesh.stop()
            return failure.exit_code
        self._say("draining: no new requests, open ones may finish (Ctrl-C again kills)")
        await self._mesh.stop()
        self._say("killed" if self._killed else "stopped")
        return _KILLED if self._killed else 0

    async def _serve(self) -> None:
        started_s = time.monotonic()
        mesh = self._mesh
        self._say(f"starting mesh {mesh.topology.mesh.name}, logs in {mesh.log_dir}")
        await mesh.start()
        await mesh.wait_ready()
        self._say(f"ready after {time.monotonic() - started_s:.1f} s")
        self._console.print(_howto(mesh), markup=False, soft_wrap=True)
        raise await mesh.failed()

    async def _until_asked(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        serving = asyncio.create_task(work)
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if serving.done():
            serving.result()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    def _on_signal(self) -> None:
        if self._asked.is_set():
            self._killed = True
            self._mesh.kill_all()
        self._asked.set()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone: drain all the same
            self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)


def _signals() -> list[signal.Signals]:
    """A closed terminal is a reason to drain, unless nohup says otherwise."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def _howto(mesh: LocalMesh) -> str:
    model_ids = mesh.topology.mesh.model_ids
    model_id = model_ids[0]
    served = f"Models: {', '.join(model_ids)}.\n" if len(model_ids) > 1 else ""
    keys = mesh.topology.keys_file
    who = (
        f"to the keys in {keys}" if keys else "to whoever reaches it: ingress.keys_file is not set"
    )
    api_key = "sk-oserve-..." if keys else "any"
    authorization = f" -H 'authorization: Bearer {api_key}'" if keys else ""
    return f"""
The mesh serves at {mesh.url}
Open {who}.
{served}
  curl {mesh.url}/v1/chat/completions -H 'content-type: application/json'{authorization} \\
    -d '{{"model": "{model_id}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{mesh.url}/v1", api_key="{api_key}")
  messages = [{{"role": "user", "content": "Hello"}}]
  for chunk in client.chat.completions.create(model="{model_id}", messages=messages, stream=True):
      print(chunk.choices[0].delta.content or "", end="")

  What runs, and how loaded it is:    oserve status{_where(mesh)}
  If something does not work:         oserve doctor{_which(mesh.topology)}
  One log file for each process:      {mesh.log_dir}/
  Ctrl-C drains and stops.
"""


def _where(mesh: LocalMesh) -> str:
    """`oserve status` looks by itself only below the default folder."""
    data_dir = mesh.data_dir
    return "" if data_dir.parent == STATE_DIR else f" --data-dir {shlex.quote(str(data_dir))}"


def _which(topology: Topology) -> str:
    """The doctor must look at the same settings."""
    file, here = topology.file, Path.cwd()
    words = ["-t", str(file.relative_to(here) if file.is_relative_to(here) else file)]
    for override in topology.overrides:
        key, _, _ = override.partition("=")
        words += ["--set", f"{key}=..." if key.rpartition(".")[2] in SECRETS else override]
    return "".join(f" {shlex.quote(word)}" for word in words)
