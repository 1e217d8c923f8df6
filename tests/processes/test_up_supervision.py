"""What dies comes back, by itself, and the mesh serves again."""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from deploy.local import LocalMesh, MeshFailed
from tests.support.up import complete, wait_gone, write_topology

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

RESTARTED_S = 20.0


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(RESTARTED_S):
        while not condition():
            await asyncio.sleep(0.05)


async def _completes(mesh: LocalMesh) -> bool:
    answer = await asyncio.to_thread(complete, mesh.url)
    return answer["usage"]["completion_tokens"] == 4


def _with_mesh(topology: Path, work: Callable[[LocalMesh], Awaitable[None]]) -> list[str]:
    """Run ``work`` on a mesh; what its supervisor said."""
    said: list[str] = []

    async def run() -> None:
        async with LocalMesh(topology, port=0, say=said.append) as mesh:
            await work(mesh)
            pids = list(mesh.pids().values())
        wait_gone(pids)

    asyncio.run(run())
    return said


def test_every_kind_of_process_is_restarted(tmp_path: Path) -> None:
    """A mesh that needs an operator for each crash is not a product."""

    async def work(mesh: LocalMesh) -> None:
        assert await _completes(mesh)
        for name in ("router-0", "worker-n0-g0", "switcher", "scheduler", "ingress-0", "broker"):
            before = mesh.pids()[name]
            mesh.kill(name)
            await _until(lambda: mesh.pids().get(name, before) != before)  # noqa: B023  # awaited
            await mesh.wait_ready(RESTARTED_S)
            assert await _completes(mesh), name

    said = _with_mesh(write_topology(tmp_path), work)
    for name in ("router-0", "worker-n0-g0", "broker"):
        assert any(line.startswith(f"{name} ended with SIGKILL, restarting") for line in said), name


def test_a_service_told_to_end_drains_and_comes_back(tmp_path: Path) -> None:
    """This is how an operator restarts one service, one after the other, without a loss."""

    async def work(mesh: LocalMesh) -> None:
        before = mesh.pids()["router-0"]
        mesh.kill("router-0", signal.SIGTERM)
        await _until(lambda: mesh.pids().get("router-0", before) != before)
        assert await _completes(mesh)

    said = _with_mesh(write_topology(tmp_path), work)
    assert any("router-0 ended with exit code 0, restarting" in line for line in said)


def test_logs_are_json_lines_in_a_file_for_each_process(tmp_path: Path) -> None:
    """The place an operator looks first, and a log shipper reads."""

    async def work(mesh: LocalMesh) -> None:
        assert await _completes(mesh)

    _with_mesh(write_topology(tmp_path), work)
    logs = tmp_path / "data/logs"
    lines = (logs / "router-0.log").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert "service.started" in events
    assert "service.ended" in events
    assert "Server is ready" in (logs / "broker.log").read_text(encoding="utf-8")


def test_a_mesh_that_cannot_become_ready_says_what_is_missing(tmp_path: Path) -> None:
    """Waiting for ever, or a bare timeout, would tell the operator nothing."""
    topology = write_topology(tmp_path)

    async def run() -> None:
        mesh = LocalMesh(topology, overrides=["mesh.engine.modelled.start_s=1000"], port=0)
        await mesh.start()
        try:
            with pytest.raises(MeshFailed) as caught:
                await mesh.wait_ready(4.0)
        finally:
            await mesh.stop()
        assert "not ready after 4 s" in str(caught.value)
        assert str(mesh.log_dir) in str(caught.value)

    asyncio.run(run())
