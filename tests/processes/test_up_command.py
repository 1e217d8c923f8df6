"""``oserve up`` from start to end, as its operator sees it."""

import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from deploy.state import read_mesh_file
from tests.support.broker import Broker
from tests.support.up import Up, alive, complete, oserve, wait_gone, write_topology

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

CONFIG, UNAVAILABLE, KILLED = 78, 69, 130


def _status_pids(topology: Path) -> list[int]:
    answer = oserve("status", "-t", str(topology), "--json")
    assert answer.returncode == 0, answer.stderr
    return [service["pid"] for service in json.loads(answer.stdout)["services"]]


def test_up_serves_says_how_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    """The first two minutes with the product: start, ask, look, stop; nothing may be left."""
    topology = write_topology(tmp_path)
    with Up(topology) as up:
        url = up.url()
        assert complete(url)["usage"]["completion_tokens"] == 4
        answer = oserve("status", "-t", str(topology), "--json")
        status = json.loads(answer.stdout)
        names = {service["instance"] for service in status["services"]}
        assert names == {
            "ingress-0", "router-0", "scheduler", "switcher", "profiler", "forecaster",
            "worker-n0-g0", "worker-n0-g1",
        }  # fmt: skip
        assert [worker["worker_id"] for worker in status["workers"]] == ["n0-g0", "n0-g1"]
        assert {replica["phase"] for replica in status["replicas"]} == {"serving"}
        assert status["plan"]["plan"]["weights"]["*"] == {"r0": 0.5, "r1": 0.5}
        assert status["url"] == url
        tables = oserve("status", "-t", str(topology)).stdout
        assert "worker-n0-g0" in tables
        assert "r0 rank 0 serving" in tables
        pids = [service["pid"] for service in status["services"]]
        up.interrupt()
        assert up.exit_code() == 0, up.output
    for shown in ("curl http", "from openai import OpenAI", "Ctrl-C", "logs in"):
        assert shown in up.output
    wait_gone(pids)
    assert read_mesh_file(tmp_path / "data") is None
    gone = oserve("status", "-t", str(topology))
    assert gone.returncode == 1
    assert "no mesh runs in" in gone.stderr


def test_what_is_open_may_finish_after_ctrl_c(tmp_path: Path) -> None:
    """Stopping a mesh must not cost a client the answer that is already on its way."""
    extra = "drain_timeout_s = 30.0\n"
    topology = write_topology(tmp_path, f"\n[ingress]\n{extra}")
    slow = "mesh.engine.modelled.base_s=0.02"
    with Up(topology, "--set", slow) as up:
        url = up.url()
        answers: list[int] = []
        client = threading.Thread(
            target=lambda: answers.append(complete(url, tokens=100)["usage"]["completion_tokens"])
        )
        client.start()
        time.sleep(0.5)
        up.interrupt()
        client.join()
        assert up.exit_code() == 0, up.output
    assert answers == [100]


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    """An operator in a hurry must not wait for the longest answer."""
    topology = write_topology(tmp_path)
    with Up(topology, "--set", "mesh.engine.modelled.base_s=0.2") as up:
        url = up.url()
        pids = _status_pids(topology)

        def ask() -> None:
            with pytest.raises(OSError):  # noqa: PT011  # however the connection breaks
                complete(url, tokens=1000)

        client = threading.Thread(target=ask)
        client.start()
        time.sleep(0.5)
        up.interrupt()
        up.wait_for("draining")
        time.sleep(0.3)
        assert up.process.poll() is None, "it did not wait for the open request"
        up.interrupt()
        assert up.exit_code(timeout_s=10.0) == KILLED
        client.join()
    wait_gone(pids)


def test_ctrl_c_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    """Whoever changes their mind early must not find orphans later."""
    topology = write_topology(tmp_path)
    with Up(topology) as up:
        up.wait_for("starting mesh")
        time.sleep(0.6)
        up.interrupt()
        assert up.exit_code() == 0, up.output
    assert read_mesh_file(tmp_path / "data") is None


def test_a_killed_supervisor_takes_everything_along(tmp_path: Path) -> None:
    """Orphaned workers would hold their GPUs and ports, and nobody would restart or stop them."""
    topology = write_topology(tmp_path)
    with Up(topology) as up:
        up.url()
        pids = _status_pids(topology)
        assert all(alive(pid) for pid in pids)
        up.process.send_signal(signal.SIGKILL)
        up.exit_code()
        wait_gone(pids)
    doctor = oserve("doctor", "-t", str(topology))
    assert doctor.returncode == 0, doctor.stdout
    assert "is a dead mesh's" in doctor.stdout
    with Up(topology) as again:  # on the store and the files that were left
        assert complete(again.url())["usage"]["completion_tokens"] == 4
        again.interrupt()
        assert again.exit_code() == 0


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    """Otherwise the operator waits, and finds the cause in the eleventh log file."""
    topology = write_topology(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = oserve("up", "-t", str(topology), "--port", str(port))
    assert answer.returncode == CONFIG
    assert f"{port}" in answer.stderr
    assert "already taken by python" in answer.stderr
    assert f"--port {port + 1}" in answer.stderr
    assert not (tmp_path / "data/logs").exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("http_prot = 1\n", "up.http_prot"),
        ("\n[router]\npolcy = 'plan'\n", "router.polcy"),
        ("\n[worker]\nreport_s = 'often'\n", "worker.report_s"),
        ("\n[wroker]\n", "wroker"),
    ],
)
def test_a_wrong_setting_stops_the_mesh_and_is_named(
    tmp_path: Path, extra: str, named: str
) -> None:
    """Restarting a service with a wrong setting for ever would hide the setting."""
    answer = oserve("up", "-t", str(write_topology(tmp_path, extra)))
    said = answer.stdout + answer.stderr
    assert answer.returncode == CONFIG, said
    assert named in said


def test_an_unreachable_broker_is_named(tmp_path: Path) -> None:
    """A mesh without its broker can do nothing: say so, and where it was looked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    extra = f'\n[bus]\nurl = "nats://127.0.0.1:{port}"\nconnect_timeout_s = 0.3\n'
    answer = oserve("up", "-t", str(write_topology(tmp_path, extra)))
    assert answer.returncode == UNAVAILABLE
    assert f"no broker at 127.0.0.1:{port}" in answer.stdout + answer.stderr


def test_one_data_folder_holds_one_mesh(tmp_path: Path) -> None:
    """Two brokers on one store would destroy it."""
    topology = write_topology(tmp_path)
    with Up(topology) as up:
        up.url()
        second = oserve("up", "-t", str(topology))
        assert second.returncode == CONFIG
        assert f"pid {up.process.pid}" in second.stderr
        assert "up.data_dir" in second.stderr
        with Up(topology, "--set", f"up.data_dir={tmp_path}/other") as beside:
            assert complete(beside.url())["usage"]["completion_tokens"] == 4
            beside.interrupt()
            assert beside.exit_code() == 0
        up.interrupt()
        assert up.exit_code() == 0


def test_an_external_broker_is_used_and_left_alone(tmp_path: Path, nats_server: Broker) -> None:
    """A fleet has its own broker: a mesh must join it, and must not stop it."""
    extra = f'\n[bus]\nurl = "{nats_server.url}"\n'
    topology = write_topology(tmp_path, extra)
    with Up(topology) as up:
        assert complete(up.url())["usage"]["completion_tokens"] == 4
        assert not (tmp_path / "data/broker").exists()
        assert len(_status_pids(topology)) == 8
        doctor = oserve("doctor", "-t", str(topology))
        assert "JetStream: enabled" in doctor.stdout
        assert doctor.returncode == 0, doctor.stdout
        up.interrupt()
        assert up.exit_code() == 0
    assert alive(nats_server.pid)
    silent = oserve("status", "-t", str(topology))
    assert silent.returncode == 1
    assert "no service of a mesh" in silent.stderr
