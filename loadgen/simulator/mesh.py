"""The mesh in a simulated world: real cores of every control-plane service, wired as in production.

One seed draws everything: the topology, its later edit by an operator, the requests, the weather
and the incidents. ``Mesh.run`` lets the faults rage for a while, then calms the world and waits
until the mesh has settled; what must hold is asserted on the way and at the end.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from loadgen.simulator.clients import Clients, Order, draw_orders
from loadgen.simulator.engines import Engines
from loadgen.simulator.faults import Weather, draw_incidents, draw_weather
from loadgen.simulator.ingress import Ingress, inputs
from loadgen.simulator.invariants import EpochWatch, MemoryWatch, PlanHistory, RequestWatch
from loadgen.simulator.mesh_services import (
    IMPATIENT,
    IMPATIENT_FAILURES,
    MODEL,
    PATIENT,
    router_node,
    scheduler_node,
    switcher_node,
)
from loadgen.simulator.mesh_topology import draw_hosts, draw_wishes
from loadgen.simulator.peers import Peers
from loadgen.simulator.process import Job, NodeSpec, Port
from loadgen.simulator.streaming import Streaming
from loadgen.simulator.wisher import Wisher
from loadgen.simulator.workshop import NO_FAULTS, SMALL_SHAPE, EngineFaults, SmallWorkshop
from loadgen.simulator.world import World
from services.scheduler import core as scheduler
from services.switcher import core as switcher
from services.worker.config import WorkerConfig
from services.worker.core import INPUTS as WORKER_INPUTS
from services.worker.core import WorkerCore
from services.worker.identity import WorkerIdentity
from services.worker.replica import LiveRequest
from shared.core import Core
from shared.hardware import GpuSpec
from shared.mesh import MeshConfig
from shared.messages.plans import DeploymentPlan, StoredPlan

INGRESS = "ingress-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to; ``digest`` is equal for equal seeds and code."""

    seed: int
    digest: str
    steps: int
    time_s: float
    requests: int
    attempts: int
    failed: int
    lost: int
    switches: int
    rollbacks: int
    live: int
    reloads: int
    moved: int
    replayed: int
    restarted: int
    epoch: int


class Mesh:
    FAULTS_S = 20.0
    SETTLE_S = 60.0  # once calm: far beyond the sum of all timeouts above
    ROUTERS = 2
    STRICT = False  # nothing goes wrong, and everything is checked that holds then
    ALSO: tuple[str, ...] = ()  # processes of a richer mesh that incidents strike, too

    def __init__(self, seed: int, *, trace_max: int = 2000) -> None:
        self.seed = seed
        rng = random.Random(f"mesh/{seed}")
        self._hosts = draw_hosts(rng)
        self._edits = 0
        self._wishes = draw_wishes(rng, self._hosts, self._edits)
        faults = self._engine_faults(rng)
        self.peers = Peers()
        self.workshop = SmallWorkshop(random.Random(f"workshop/{seed}"), faults)
        self.world = World(seed, weather=self._weather(rng), trace_max=trace_max)
        self.history = PlanHistory(self.world, writer="switcher")
        self.epochs = EpochWatch(self.world)
        self.memory = MemoryWatch(self.world)
        self.requests = RequestWatch(self.world, self.memory, strict=self.STRICT)
        self._draw_plans(rng)
        self._add_services(rng)
        self._plan_faults(rng)

    def _weather(self, rng: random.Random) -> Weather:
        return draw_weather(rng)

    def _engine_faults(self, rng: random.Random) -> EngineFaults:
        return EngineFaults(
            start_fails=rng.choice([0.0, 0.0, 0.3]),
            start_hangs=rng.choice([0.0, 0.0, 0.2]),
            step_breaks=rng.choice([0.0, 0.0, 0.005]),
            take_fails=rng.choice([0.0, 0.0, 0.2]),
        )

    def _draw_plans(self, rng: random.Random) -> None:
        """When the operator edits the topology."""
        for _ in range(rng.randint(0, 4)):
            self.world.at(rng.uniform(4.0, 18.0), lambda: self._edit_topology(rng))

    def run(self) -> Outcome:
        """Everything to its end; raises AssertionError if the mesh broke a promise."""
        world = self.world
        world.run(self.FAULTS_S)
        world.calm()
        self.workshop.faults = NO_FAULTS
        while world.now_s < self.FAULTS_S + self.SETTLE_S:
            world.run(world.now_s + 1.0)
            if not self.unsettled():
                break
        assert not self.unsettled(), f"still unsettled when calm: {self.unsettled()}"
        stored = self._stored()
        assert stored is not None
        return Outcome(
            seed=self.seed,
            digest=world.trace.digest,
            steps=world.steps,
            time_s=world.now_s,
            requests=len(self.clients),
            attempts=self.clients.attempts,
            failed=self.clients.count("failed"),
            lost=self.clients.count("lost"),
            switches=self.history.switches,
            rollbacks=self.history.rollbacks,
            live=self.requests.ways["live"],
            reloads=self.requests.ways["reload"],
            moved=self.requests.moved,
            replayed=self.requests.replayed,
            restarted=self.requests.restarted,
            epoch=stored.epoch,
        )

    def unsettled(self) -> list[str]:
        """What is not yet as everyone wishes; empty when the mesh is at rest."""
        waiting: list[str] = []
        if not self.clients.done:
            waiting.append(f"open requests {self.clients.open}")
        if attempts := self._attempts():
            waiting.append(f"workers still run {attempts}")
        stored, brain = self._stored(), self.world.core("scheduler")
        if stored is None or stored.target is not None:
            return [*waiting, "a switch is under way"]
        assert isinstance(brain, scheduler.Scheduler | Wisher)
        if not brain.content:
            waiting.append(f"the scheduler wishes for {brain.wish}")
        if not self.as_wished(stored.in_force):
            waiting.append(f"placed are only {stored.in_force.replicas}")
        wanted = {(gpu, spec.replica_id) for spec in stored.in_force.replicas for gpu in spec.gpus}
        if (held := self._held()) != wanted:
            waiting.append(f"workers serve {sorted(held)}, the plan says {sorted(wanted)}")
        return waiting

    def as_wished(self, plan: DeploymentPlan) -> bool:
        """Whether ``plan`` is what should serve in the end."""
        placed = {spec.replica_id for spec in plan.replicas}
        return bool(self.world.lost) or placed == {wish.replica_id for wish in self._wishes}

    def _stored(self) -> StoredPlan | None:
        return cast("StoredPlan | None", self.world.bucket.load(switcher.KEY)[0])

    def _held(self) -> set[tuple[str, str]]:
        """What the workers themselves said last, before any message was lost."""
        return {
            (worker_id, held.replica_id if held.phase == "serving" else f"?{held.replica_id}")
            for worker_id, report in self.epochs.reports.items()
            if worker_id not in self.world.lost
            for held in report.replicas
        }

    def _attempts(self) -> list[LiveRequest]:
        """What the workers still run, for a client or for nobody."""
        workers = (self.world.core(gpu.gpu_id) for host in self._hosts for gpu in host.gpu_specs())
        return [live for core in workers if isinstance(core, Streaming) for live in core.core.live]

    def _add_services(self, rng: random.Random) -> None:
        add = self.world.add
        for i in range(self.ROUTERS):
            add(router_node(f"router-{i}"))
        add(self.scheduler())
        add(switcher_node())
        for host in self._hosts:
            for gpu in host.gpu_specs():
                add(self._worker(host.node_id, gpu))
        self._add_ingress(rng)

    def scheduler(self) -> NodeSpec:
        return scheduler_node(self.topology)

    def _add_ingress(self, rng: random.Random) -> None:
        """In most runs it waits as long as it takes, so that no request may fail at all."""
        patient = rng.random() < 0.75  # noqa: PLR2004  # the share of such runs
        config = PATIENT if patient else IMPATIENT
        may_fail = () if patient else IMPATIENT_FAILURES
        self.clients = Clients(self._draw_orders(rng), may_fail=may_fail)

        def make(_number: int, _port: Port) -> tuple[Core, Mapping[str, Job]]:
            core = Ingress(config, self.clients, ingress_id=INGRESS, model_id=MODEL.model_id)
            return core, {}

        self.world.add(NodeSpec(name=INGRESS, make=make, inputs=inputs(INGRESS)))

    def _draw_orders(self, rng: random.Random) -> list[Order]:
        return draw_orders(rng, until_s=self.FAULTS_S)

    def _worker(self, node_id: str, gpu: GpuSpec) -> NodeSpec:
        worker_id = gpu.gpu_id

        def make(number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
            incarnation = f"{worker_id}-{number}"
            identity = WorkerIdentity(
                worker_id=worker_id,
                incarnation=incarnation,
                node_id=node_id,
                gpu=gpu,
                models=(MODEL.model_id,),
                peer=incarnation,
                shapes=(SMALL_SHAPE,),
                followers=True,
            )
            config = WorkerConfig(worker_id=worker_id, report_s=0.25, drain_timeout_s=1.0)
            rng = random.Random(f"engine/{self.seed}/{incarnation}")
            engines = Engines(
                port,
                incarnation=incarnation,
                workshop=self.workshop,
                rng=rng,
                peers=self.peers,
            )
            self.memory.host(engines, gpu)
            return Streaming(WorkerCore(config, identity), engines), engines.jobs()

        inputs = tuple(subject.of(worker_id=worker_id) for subject in WORKER_INPUTS)
        return NodeSpec(name=worker_id, make=make, inputs=inputs)

    def topology(self) -> MeshConfig:
        return MeshConfig(model=MODEL, nodes=self._hosts, replicas=self._wishes).checked()

    def _plan_faults(self, rng: random.Random) -> None:
        workers = [gpu.gpu_id for host in self._hosts for gpu in host.gpu_specs()]
        routers = [f"router-{i}" for i in range(self.ROUTERS)]
        services = ["switcher", "scheduler", *routers, INGRESS, *self.ALSO]
        incidents = draw_incidents(
            rng,
            nodes=[*workers, *services, "switcher", "switcher", "scheduler"],
            twins=("switcher",),
            until_s=self.FAULTS_S,
            incidents_max=12,
        )
        self.world.plan(incidents)
        if rng.random() < 0.3:  # noqa: PLR2004  # in some runs a machine is gone for good
            at_s = rng.uniform(2.0, self.FAULTS_S * 0.9)
            self.world.at(at_s, lambda: self.lose(rng.choice(workers), rng))

    def lose(self, worker_id: str, rng: random.Random) -> None:
        del rng
        self.world.lose(worker_id)

    def _edit_topology(self, rng: random.Random) -> None:
        """The operator wishes for other replicas and restarts the scheduler."""
        self._edits += 1
        self._wishes = draw_wishes(rng, self._hosts, self._edits)
        self.world.restart("scheduler")


def simulate(seed: int) -> Outcome:
    """One whole run."""
    return Mesh(seed).run()


def replay_command(seed: int, world: str = "mesh") -> str:
    """What shows that run again, with its trace if it fails."""
    return f"python -m loadgen.simulator --seed {seed}" + (
        "" if world == "mesh" else f" --world {world}"
    )
