"""Watches a running mesh from outside, on its bus and its HTTP port, as an operator would."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import aiohttp
import msgspec

from deploy.local import LocalMesh
from shared.bus import BusConfig, Delivery, NatsBus
from shared.errors import BusUnavailable
from shared.messages.base import decode
from shared.messages.plans import PlanInForce
from shared.messages.replicas import ReplicaReport, WorkerReport
from shared.subjects import PLAN_IN_FORCE, REPLICA_REPORT, WORKER_REPORT

POLL_S = 0.05
FRESH_S = 1.5  # reports are published at least twice a second, the plan once
_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)


class Unrecovered(AssertionError):
    """The mesh did not get to the awaited state in time; says what was missing last."""


class MeshWatch:
    """The newest of all reports, and when each was heard."""

    def __init__(self, mesh: LocalMesh, bus: NatsBus, http: aiohttp.ClientSession) -> None:
        self.mesh = mesh
        self.epochs: list[int] = []  # of the plans heard, without repetitions
        self._bus, self._http = bus, http
        self._plan: tuple[float, PlanInForce] | None = None
        self._workers: dict[str, tuple[float, WorkerReport]] = {}
        self._replicas: dict[str, tuple[float, ReplicaReport]] = {}

    async def listen(self) -> None:
        await self._bus.subscribe(PLAN_IN_FORCE.wildcard, self._on_plan)
        await self._bus.subscribe(WORKER_REPORT.wildcard, self._on_worker)
        await self._bus.subscribe(REPLICA_REPORT.wildcard, self._on_replica)

    @property
    def plan(self) -> PlanInForce:
        assert self._plan is not None, "no plan was heard yet"
        return self._plan[1]

    def incarnation(self, worker_id: str) -> str:
        return self._workers[worker_id][1].incarnation

    def running(self, worker_id: str) -> int:
        """Requests in the batches that this worker leads, by its newest reports: of a replica that
        is no more there is none."""
        heard_s = monotonic() - FRESH_S
        return sum(
            report.running
            for at_s, report in self._replicas.values()
            if report.worker_id == worker_id and at_s >= heard_s
        )

    async def until(self, missing: Callable[[], str], *, timeout_s: float, what: str) -> None:
        """Poll until ``missing`` says ""; raises Unrecovered with what it said last."""
        deadline_s = monotonic() + timeout_s
        while cause := missing():
            if monotonic() >= deadline_s:
                raise Unrecovered(f"{what}: after {timeout_s:g} s still: {cause}")
            await asyncio.sleep(POLL_S)

    async def until_whole(self, *, since_s: float, timeout_s: float, planned: bool = False) -> None:
        """Until every process runs and answers discovery, and every replica of the topology is in
        the plan in force and serves, all of it heard after ``since_s``. With ``planned`` the plan
        in force may be any; its replicas must serve."""
        deadline_s = monotonic() + timeout_s
        while True:
            cause = (
                self.not_whole(since_s, planned=planned)
                or await self._unanswered()
                or await self._unready()
            )
            if not cause:
                return
            if monotonic() >= deadline_s:
                raise Unrecovered(f"not whole {timeout_s:g} s after the fault: {cause}")
            await asyncio.sleep(POLL_S)

    def not_whole(self, since_s: float, *, planned: bool = False) -> str:
        """What the reports heard since then lack; "" if nothing."""
        heard_s = max(since_s, monotonic() - FRESH_S)
        if self._plan is None or self._plan[0] < heard_s:
            return "no plan in force heard"
        plan = self._plan[1]
        if plan.switching_to:
            return f"a switch from epoch {plan.epoch} to {plan.switching_to} is under way"
        mesh = self.mesh.topology.mesh
        wished = plan.plan.replicas if planned else mesh.replicas
        if not wished:
            return f"the plan of epoch {plan.epoch} is empty"
        replicas = (self._replica_amiss(w.replica_id, plan, heard_s) for w in wished)
        workers = (self._worker_amiss(gpu.gpu_id, plan, heard_s) for gpu in mesh.gpus())
        return next((cause for cause in (*replicas, *workers) if cause), "")

    def _replica_amiss(self, replica_id: str, plan: PlanInForce, heard_s: float) -> str:
        specs = {spec.replica_id: spec for spec in plan.plan.replicas}
        if replica_id not in specs:
            return f"{replica_id} is not in the plan of epoch {plan.epoch}"
        at_s, report = self._replicas.get(replica_id, (0.0, None))
        if report is None or at_s < heard_s:
            return f"{replica_id} does not report"
        right = report.phase == "serving" and report.worker_id == specs[replica_id].gpus[0]
        return "" if right else f"{replica_id} is {report.phase} on {report.worker_id}"

    def _worker_amiss(self, worker_id: str, plan: PlanInForce, heard_s: float) -> str:
        at_s, report = self._workers.get(worker_id, (0.0, None))
        if report is None or at_s < heard_s:
            return f"worker {worker_id} does not report"
        planned = {s.replica_id for s in plan.plan.replicas if worker_id in s.gpus}
        amiss = {r.replica_id for r in report.replicas} ^ planned
        return f"worker {worker_id} and the plan differ in {amiss}" if amiss else ""

    async def metric(self, name: str) -> dict[str, float]:
        """Samples of one of the first ingress's metrics, by their labels."""
        async with self._http.get(f"{self.mesh.url}/metrics") as answer:
            text = await answer.text()
        found = _SAMPLE.finditer(text)
        return {m["labels"] or "": float(m["value"]) for m in found if m["name"] == name}

    async def _unanswered(self) -> str:
        """Which supervised service is not the process that answers discovery."""
        try:
            answers = await self._bus.services(wait_s=0.2)
        except BusUnavailable as error:
            return str(error)
        found = {_instance(answer): _pid(answer) for answer in answers}
        for name, process in self.mesh.processes.items():
            if process.pid is None:
                return f"{name} does not run"
            if name != "broker" and found.get(name) != process.pid:
                return f"{name} does not answer discovery"
        return ""

    async def _unready(self) -> str:
        try:
            async with self._http.get(f"{self.mesh.url}/ready") as answer:
                return "" if answer.status == 200 else f"/ready: {await answer.text()}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"/ready: {error!r}"

    def _on_plan(self, delivery: Delivery) -> None:
        plan = decode(delivery.payload, PlanInForce)
        self._plan = (monotonic(), plan)
        if not self.epochs or self.epochs[-1] != plan.epoch:
            self.epochs.append(plan.epoch)

    def _on_worker(self, delivery: Delivery) -> None:
        report = decode(delivery.payload, WorkerReport)
        self._workers[report.worker_id] = (monotonic(), report)

    def _on_replica(self, delivery: Delivery) -> None:
        report = decode(delivery.payload, ReplicaReport)
        self._replicas[report.replica_id] = (monotonic(), report)


def _instance(answer: dict[str, Any]) -> str:
    return answer.get("metadata", {}).get("instance", "")


def _pid(answer: dict[str, Any]) -> int:
    return int(answer.get("metadata", {}).get("pid", 0))


@asynccontextmanager
async def watching(mesh: LocalMesh) -> AsyncGenerator[MeshWatch]:
    """A watch on a mesh that runs; it outlives restarts of the broker."""
    bus = NatsBus(msgspec.structs.replace(BusConfig(), url=mesh.bus_url))
    await bus.connect(name="test-watch")
    try:
        timeout = aiohttp.ClientTimeout(total=5.0)
        apart = aiohttp.TCPConnector(force_close=True)  # a kept connection is a descriptor more
        async with aiohttp.ClientSession(timeout=timeout, connector=apart) as http:
            watch = MeshWatch(mesh, bus, http)
            await watch.listen()
            yield watch
    finally:
        await bus.close()
