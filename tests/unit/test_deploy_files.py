"""Topology files, log files, locks and keys of the command line."""

import hashlib
import itertools
import json
import tomllib
from pathlib import Path

import pytest

from deploy.config import load_topology
from deploy.keys import new_key
from deploy.logs import RotatingLog, last_words
from deploy.services import STOP_ORDER, service_specs, worker_environ
from deploy.state import DataDirLock, MeshFile, is_locked, read_mesh_file, write_mesh_file
from services.ingress.keys import KeyRing
from shared.errors import ConfigInvalid

TOPOLOGIES = sorted((Path(__file__).parents[2] / "deploy/topologies").glob("*.toml"))
MESH = """
[mesh]
name = "m"
[[mesh.nodes]]
node_id = "n0"
gpus = 2
[[mesh.replicas]]
replica_id = "r0"
"""


def _file(folder: Path, extra: str = "") -> Path:
    file = folder / "m.toml"
    file.write_text(MESH + extra, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", TOPOLOGIES, ids=lambda file: file.name)
def test_the_topologies_we_ship_are_valid(file: Path) -> None:
    """The first command of the README must not end in a configuration error."""
    topology = load_topology(file)
    assert topology.broker_embedded
    assert topology.http_port == 8000
    assert topology.data_dir == Path(".oserve") / topology.mesh.name


def test_naming_a_broker_means_using_it(tmp_path: Path) -> None:
    """A mesh that silently brought its own broker would not be part of the operator's fleet."""
    assert load_topology(_file(tmp_path)).broker_embedded
    assert not load_topology(_file(tmp_path, '[bus]\nurl = "nats://b:4222"\n')).broker_embedded
    assert not load_topology(_file(tmp_path), ["bus.url=nats://b:4222"]).broker_embedded
    assert load_topology(_file(tmp_path, '[bus]\nuser = "u"\n')).broker_embedded


def test_the_port_is_the_ingress_settings_unless_up_says_otherwise(tmp_path: Path) -> None:
    """One topology file serves a laptop and a fleet: the port must not need two entries."""
    assert load_topology(_file(tmp_path)).http_port == 8000
    assert load_topology(_file(tmp_path, "[ingress]\nport = 9000\n")).http_port == 9000
    both = "[ingress]\nport = 9000\n[up]\nhttp_port = 0\n"
    assert load_topology(_file(tmp_path, both)).http_port == 0


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ("[up]\nrouters = 0\n", "up.routers"),
        ("[up]\nhttp_port = 70000\n", "up.http_port"),
        ("[up]\nunknown = 1\n", "up.unknown"),
        ("[up]\nready_timeout_s = 0\n", "up.ready_timeout_s"),
        ('[ingress]\nport = "eighty"\n', "ingress.port"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, extra: str, field: str) -> None:
    """An operator can mend only what is named."""
    with pytest.raises(ConfigInvalid) as caught:
        load_topology(_file(tmp_path, extra))
    assert caught.value.field == field


def test_a_mesh_without_gpus_is_refused(tmp_path: Path) -> None:
    """It would start, wait for a worker that nobody runs, and time out."""
    file = tmp_path / "m.toml"
    file.write_text('[mesh]\nname = "m"\n', encoding="utf-8")
    with pytest.raises(ConfigInvalid, match="at least one node"):
        load_topology(file)


def test_every_process_is_stopped_in_some_stage(tmp_path: Path) -> None:
    """A process that no stage names would outlive Ctrl-C."""
    specs = service_specs(
        load_topology(_file(tmp_path)), bus_url="nats://b", http_ports=(8000, 8001), environ={}
    )
    names = [spec.name for spec in specs]
    assert names[:2] == ["worker-n0-g0", "worker-n0-g1"]
    assert set(names[2:]) == {
        "scheduler", "switcher", "profiler", "forecaster", "router-0", "router-1",
        "ingress-0", "ingress-1",
    }  # fmt: skip
    roles = [role for stage in STOP_ORDER for role in stage]
    assert {spec.role for spec in specs} | {"broker"} == set(roles)
    assert roles[0] == "ingress"
    assert roles[-1] == "broker"


def test_what_the_mesh_decides_beats_what_the_operator_overrides(tmp_path: Path) -> None:
    """A worker with another's identity, or a service on another broker, would split the mesh."""
    topology = load_topology(_file(tmp_path), ["router.policy=round_robin"])
    specs = service_specs(topology, bus_url="nats://b:1", http_ports=(8000,), environ={})
    command = next(spec.command for spec in specs if spec.name == "worker-n0-g1")
    sets = [value for flag, value in itertools.pairwise(command) if flag == "--set"]
    assert sets == ["router.policy=round_robin", "bus.url=nats://b:1", "worker.worker_id=n0-g1"]


def test_metrics_ports_count_up_from_the_one_that_is_set(tmp_path: Path) -> None:
    """All on one port, only the first would start; all on any port, no scraper finds them."""
    topology = load_topology(_file(tmp_path), ["telemetry.metrics_port=9100"])
    specs = service_specs(topology, bus_url="nats://b", http_ports=(8000,), environ={})
    ports = [spec.command[-1] for spec in specs]
    assert ports == [f"telemetry.metrics_port={9100 + place}" for place in range(len(specs))]
    with pytest.raises(ConfigInvalid, match=r"telemetry\.metrics_port"):
        load_topology(_file(tmp_path), ["telemetry.metrics_port=many"])


def test_workers_share_the_cores_and_own_their_gpu(tmp_path: Path) -> None:
    """Two workers with all cores each thrash; two on the same GPU run out of its memory."""
    torch = (
        '[mesh.engine]\nkind = "torch"\n[mesh.model]\nmodel_id = "t"\npath = "p"\n'
        '[[mesh.nodes]]\nnode_id = "n1"\ngpus = 2\ngpu_kind = "h200"\n'
    )
    topology = load_topology(_file(tmp_path, torch))
    assert "CUDA_VISIBLE_DEVICES" not in worker_environ(topology, index=0, environ={})
    assert worker_environ(topology, index=3, environ={})["CUDA_VISIBLE_DEVICES"] == "3"
    visible = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert worker_environ(topology, index=3, environ=visible)["CUDA_VISIBLE_DEVICES"] == "7"
    assert int(worker_environ(topology, index=0, environ={})["OMP_NUM_THREADS"]) >= 1
    assert "OMP_NUM_THREADS" not in worker_environ(
        topology, index=0, environ={"OMP_NUM_THREADS": "3"}
    )


def test_logs_are_bounded_and_lines_stay_whole(tmp_path: Path) -> None:
    """A mesh that runs for months must not fill the disk, and a log shipper needs whole lines."""
    log = RotatingLog(tmp_path / "a.log", bytes_max=1000, files_max=2)
    for number in range(500):
        line = f"line {number:04} {'x' * 40}\n".encode()
        log.write(line[:20])  # as a pipe delivers: anywhere
        log.write(line[20:])
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.log", "a.log.1", "a.log.2"]
    assert all(file.stat().st_size < 1200 for file in files)
    kept = b"".join(file.read_bytes() for file in reversed(files)).decode().splitlines()
    assert [int(line.split()[1]) for line in kept] == list(range(500 - len(kept), 500))


def test_a_log_goes_on_after_a_restart_of_the_supervisor(tmp_path: Path) -> None:
    """What happened before a crash is what the operator wants to read after it."""
    for text in (b"before\n", b"after\n"):
        log = RotatingLog(tmp_path / "a.log", bytes_max=1000, files_max=2)
        log.write(text)
        assert log.tail() == [text.decode().strip()]
        log.close()
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == "before\nafter\n"


def test_last_words_are_for_people() -> None:
    """The reason of an end stands among lines for machines."""
    assert last_words(['{"event":"a"}', "oserve router: bad", '{"event":"b"}']) == (
        "oserve router: bad"
    )
    assert last_words(['{"event":"a"}']) == '{"event":"a"}'
    assert last_words([]) == "it said nothing"


def test_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    """A stale lock would keep a mesh from starting after a crash; without one two would start."""
    first, second = DataDirLock(tmp_path / "d"), DataDirLock(tmp_path / "d")
    assert not is_locked(tmp_path / "d")
    first.acquire()
    assert is_locked(tmp_path / "d")
    with pytest.raises(ConfigInvalid, match="a mesh runs in it already"):
        second.acquire()
    first.release()
    assert not is_locked(tmp_path / "d")
    second.acquire()
    second.release()


def test_a_broken_mesh_file_is_no_mesh(tmp_path: Path) -> None:
    """`oserve status` must say that nothing runs, not fail on what a full disk left."""
    content = MeshFile(
        name="m", pid=1, url="u", bus_url="b", topology="t", log_dir="l", started_unix_s=0.0
    )
    write_mesh_file(tmp_path, content)
    assert read_mesh_file(tmp_path) == content
    (tmp_path / "mesh.json").write_text('{"name": ', encoding="utf-8")
    assert read_mesh_file(tmp_path) is None
    assert read_mesh_file(tmp_path / "nowhere") is None


def test_a_new_key_opens_the_ingress(tmp_path: Path) -> None:
    """The entry that `oserve keys new` prints must be one that the ingress accepts."""
    key = new_key(tenant="search", slo_class="interactive")
    (tmp_path / "keys.toml").write_text(key.entry, encoding="utf-8")
    identity = KeyRing.load(str(tmp_path / "keys.toml")).authenticate(f"Bearer {key.text}")
    assert (identity.tenant, identity.slo_class) == ("search", "interactive")
    assert key.text not in key.entry
    assert hashlib.sha256(key.text.encode()).hexdigest() in key.entry
    limited = new_key(tenant="search", slo_class="batch", requests_per_s=2.5, tokens_per_minute=600)
    (entry,) = tomllib.loads(limited.entry)["keys"]
    assert (entry["requests_per_s"], entry["tokens_per_minute"]) == (2.5, 600)
    with pytest.raises(ConfigInvalid, match="interactive, standard, batch"):
        new_key(tenant="search", slo_class="fast")
    with pytest.raises(ConfigInvalid, match="tenant"):
        new_key(tenant="a b", slo_class="batch")


def test_json_of_the_mesh_file_is_for_other_tools_too(tmp_path: Path) -> None:
    """Scripts find the mesh's port and broker there."""
    content = MeshFile(
        name="m", pid=1, url="u", bus_url="b", topology="t", log_dir="l", started_unix_s=0.0
    )
    write_mesh_file(tmp_path, content)
    assert json.loads((tmp_path / "mesh.json").read_text(encoding="utf-8"))["bus_url"] == "b"
