"""``oserve status``: what runs, asked of the mesh itself.

Services are asked by NATS service discovery; workers, replicas and the plan report anyway, so it
is enough to listen for a little longer than their slowest report takes.
"""

import asyncio
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from deploy.config import STATE_DIR, load_topology
from deploy.state import is_locked, read_mesh_file, running_meshes
from shared.bus import BusConfig, Delivery, NatsBus
from shared.config import load_settings
from shared.errors import BusUnavailable, ConfigInvalid
from shared.messages.base import Message, decode
from shared.messages.plans import DeploymentPlan, PlanInForce
from shared.messages.replicas import ReplicaReport, WorkerReport
from shared.subjects import PLAN_IN_FORCE, REPLICA_REPORT, WORKER_REPORT, Subject

LISTEN_S = 1.2  # the plan in force is republished each second
LATE_S = 2.0  # more for a plan that is late: a busy machine is no broken mesh
_POLL_S = 0.1
_DISCOVERY_S = 0.4
_CONNECT_S = 2.0
_PREFIX = "oserve-"
M = TypeVar("M", bound=Message)


class ServiceSeen(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    instance: str
    version: str
    pid: int
    metrics_url: str


class MeshStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a mesh: the newest report of everything that reported."""

    bus_url: str
    url: str  # "" when the mesh was not started on this machine
    services: tuple[ServiceSeen, ...]
    workers: tuple[WorkerReport, ...]
    replicas: tuple[ReplicaReport, ...]
    plan: PlanInForce | None

    def missing(self) -> str:
        """Why this is not a mesh that serves; "" if it is one."""
        if not self.services and not self.workers:
            return f"the broker at {self.bus_url} answers, but no service of a mesh does"
        if self.plan is None:
            return "no switcher says which plan is in force"
        # A paused one is about to hand over what it runs: no request is refused for that.
        if not any(report.phase in ("serving", "paused") for report in self.replicas):
            return "no replica serves"
        return ""


def run_status(*, topology: Path | None, data_dir: Path | None, bus_url: str, as_json: bool) -> int:
    """Print the status; the exit code. Raises ConfigInvalid."""
    console = Console(highlight=False)
    try:
        bus, url = find_mesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
        status = asyncio.run(ask_mesh(bus, url=url))
    except BusUnavailable as error:
        Console(stderr=True).print(f"oserve status: {error}", markup=False)
        return 1
    if as_json:
        console.print(msgspec.json.encode(status).decode(), markup=False, soft_wrap=True)
    else:
        _show(console, status)
    cause = status.missing()
    if cause:
        Console(stderr=True).print(f"oserve status: {cause}", markup=False)
    return 1 if cause else 0


def find_mesh(
    *, topology: Path | None, data_dir: Path | None, bus_url: str
) -> tuple[BusConfig, str]:
    """Where the mesh's broker is, and its URL if it was started here. Raises ConfigInvalid,
    BusUnavailable."""
    bus = load_settings(file=None, environ=os.environ).section("bus", BusConfig)
    if bus_url:
        return msgspec.structs.replace(bus, url=bus_url), ""
    if topology is not None:
        loaded = load_topology(topology)
        if not loaded.broker_embedded:
            return loaded.bus, ""
        bus, data_dir = loaded.bus, data_dir or loaded.data_dir
    if data_dir is not None:
        mesh = read_mesh_file(data_dir) if is_locked(data_dir) else None
        if mesh is None:
            raise BusUnavailable(f"no mesh runs in {data_dir}: start one with `oserve up`")
        return msgspec.structs.replace(bus, url=mesh.bus_url), mesh.url
    return _only_mesh(bus)


def _only_mesh(bus: BusConfig) -> tuple[BusConfig, str]:
    """The one mesh that runs below the current folder; else the broker of the settings."""
    running = running_meshes()
    if len(running) > 1:
        names = ", ".join(str(STATE_DIR / mesh.name) for mesh in running)
        raise ConfigInvalid(
            field="--data-dir", value=None, remedy=f"several run: name one: {names}"
        )
    if running:
        return msgspec.structs.replace(bus, url=running[0].bus_url), running[0].url
    return bus, ""


async def ask_mesh(config: BusConfig, *, url: str = "") -> MeshStatus:
    """Listen, ask, and put it together. Raises BusUnavailable."""
    bus = NatsBus(msgspec.structs.replace(config, connect_timeout_s=_CONNECT_S))
    await bus.connect(name="oserve-status")
    try:
        workers = await _newest(bus, WORKER_REPORT)
        replicas = await _newest(bus, REPLICA_REPORT)
        plans = await _newest(bus, PLAN_IN_FORCE)
        asked = await bus.services(wait_s=_DISCOVERY_S)
        await asyncio.sleep(LISTEN_S - _DISCOVERY_S)
        for _ in range(round(LATE_S / _POLL_S)):
            if plans or not asked:
                break
            await asyncio.sleep(_POLL_S)
    finally:
        await bus.close()
    return MeshStatus(
        bus_url=config.url,
        url=url,
        services=tuple(sorted(_services(asked), key=lambda seen: seen.instance)),
        workers=tuple(workers[name] for name in sorted(workers)),
        replicas=tuple(replicas[name] for name in sorted(replicas)),
        plan=next(iter(plans.values()), None),
    )


async def _newest(bus: NatsBus, subject: Subject[M]) -> dict[str, M]:
    """Filled as messages arrive: the newest of each concrete subject."""
    newest: dict[str, M] = {}

    def on_message(delivery: Delivery) -> None:
        newest[delivery.subject] = decode(delivery.payload, subject.message)

    await bus.subscribe(subject.wildcard, on_message)
    return newest


def _services(asked: list[dict[str, Any]]) -> list[ServiceSeen]:
    return [
        ServiceSeen(
            name=info["name"].removeprefix(_PREFIX),
            instance=info["metadata"].get("instance", "?"),
            version=info["version"],
            pid=int(info["metadata"].get("pid", 0)),
            metrics_url=info["metadata"].get("metrics", ""),
        )
        for info in asked
        if info.get("name", "").startswith(_PREFIX)
    ]


def _show(console: Console, status: MeshStatus) -> None:
    console.print(f"mesh {status.url or '(started elsewhere)'}, broker {status.bus_url}")
    for table in (_services_table(status), _gpus_table(status), _replicas_table(status)):
        console.print(table)
    if status.plan is not None:
        for line in _plan_lines(status.plan):
            console.print(line, markup=False)


def _services_table(status: MeshStatus) -> Table:
    table = Table("service", "pid", "version", "metrics", title="Services", title_justify="left")
    for seen in status.services:
        table.add_row(seen.instance, str(seen.pid), seen.version, seen.metrics_url)
    return table


def _gpus_table(status: MeshStatus) -> Table:
    table = Table("GPU", "node", "kind", "hosts", title="GPUs", title_justify="left")
    for report in status.workers:
        hosts = [f"{r.replica_id} rank {r.rank} {r.phase}" for r in report.replicas]
        state = "leaving" if report.leaving else (", ".join(hosts) or "idle")
        table.add_row(report.worker_id, report.node_id, report.gpu.kind, state)
    return table


def _replicas_table(status: MeshStatus) -> Table:
    shapes = {s.replica_id: s.parallelism for s in status.plan.plan.replicas} if status.plan else {}
    columns = ("replica", "shape", "phase", "running", "waiting", "KV", "step", "requests")
    table = Table(*columns, title="Replicas", title_justify="left")
    for report in status.replicas:
        used = report.kv_blocks_used / report.kv_blocks_total if report.kv_blocks_total else 0.0
        table.add_row(
            report.replica_id,
            shapes.get(report.replica_id, "not in the plan"),
            report.phase,
            f"{report.running}/{report.running_max}",
            f"{report.waiting}/{report.waiting_max}",
            f"{used:.0%}",
            f"{1000 * report.step_s:.1f} ms",
            str(report.requests_total),
        )
    return table


def _plan_lines(in_force: PlanInForce) -> list[str]:
    plan = in_force.plan
    lines = [f"Plan {plan.plan_id or '(empty)'}, epoch {in_force.epoch}: {plan.reason}"]
    if in_force.switching_to:
        lines.append(f"  switching to {in_force.switching_to}")
    return lines + _share_lines(plan)


def _share_lines(plan: DeploymentPlan) -> list[str]:
    """Which replicas serve which requests of which model: shares of each model's own requests."""
    models = sorted({spec.model_id for spec in plan.replicas})
    lines: list[str] = []
    for model_id in models:
        mine = {spec.replica_id for spec in plan.replicas if spec.model_id == model_id}
        for_model = f" for {model_id}" if len(models) > 1 else ""
        for kind, row in sorted(plan.weights.items()):
            part = {id_: share for id_, share in sorted(row.items()) if id_ in mine}
            total = sum(part.values())
            if total > 0.0:
                shares = ", ".join(
                    f"{replica} {share / total:.0%}" for replica, share in part.items()
                )
                lines.append(f"  requests{for_model} of type {kind}: {shares}")
    return lines
