"""A whole mesh in virtual time, wired as in production, that serves traces."""

import dataclasses
import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from loadgen.simulator import source as ingress
from loadgen.simulator.engines import Engines
from loadgen.simulator.faults import Weather
from loadgen.simulator.jobs import slow_job
from loadgen.simulator.memory import Memory
from loadgen.simulator.migration import Migrator
from loadgen.simulator.observer import INPUTS as OBSERVED
from loadgen.simulator.observer import Observer
from loadgen.simulator.oracle import INPUTS as FORESEEN
from loadgen.simulator.oracle import Oracle
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.paces import paces
from loadgen.simulator.peers import Peers
from loadgen.simulator.process import Job, NodeSpec, Port
from loadgen.simulator.pulse import Pulse
from loadgen.simulator.shapes import Copies, model_shapes, with_memory
from loadgen.simulator.source import Arrival, Source
from loadgen.simulator.streaming import Streaming
from loadgen.simulator.workshop import NO_FAULTS, Facts
from loadgen.simulator.world import World
from services.forecaster import core as forecaster
from services.profiler import core as profiler
from services.router import core as router
from services.scheduler import core as scheduler
from services.scheduler.policies.registry import make_policy
from services.scheduler.solving import solve
from services.switcher import core as switcher
from services.switcher.events import PLAN_TRANSFER
from services.switcher.planning import plan as plan_transfer
from services.worker.core import INPUTS as WORKER_INPUTS
from services.worker.core import WorkerCore
from services.worker.engine.batching import Batch
from services.worker.engine.modelled_timing import limits_of, modelled_replica
from services.worker.identity import WorkerIdentity
from shared import subjects
from shared.core import Core
from shared.hardware import GpuSpec
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SubmitRequest

INGRESS = "ingress-0"
BOOT_S = 20.0  # the mesh is brought up before the first arrival
CHECK_S = 60.0  # between two looks at every core's invariants
BOOT_START_S = 0.1
KV_SHARE_LIVE = 0.75
"""Of the memory that weights leave, what the KV cache takes where replicas switch live: with all of
it there would be no room for new ones beside the old."""


class Cluster:
    """See run.run for how it is used. It is its engines' workshop."""

    streaming = False
    faults = NO_FAULTS

    def __init__(self, spec: SimulationSpec) -> None:
        self.spec = spec
        self.mesh = spec.mesh.checked()
        for traffic in spec.traffic:
            self.mesh.model_of(traffic.model_id)
        self.arrivals = list(_merged(spec.traffic))
        self.paces = paces(spec)
        self.observer = Observer()
        weather = Weather(delay_s_min=spec.network_s, delay_s_max=0.0)
        self.world = World(spec.seed, weather=weather, checked=False)
        self.source = Source(
            self.paces.ingress,
            self.arrivals,
            ingress_id=INGRESS,
            output_tokens_limit=spec.output_tokens_limit,
            on_done=self._halt,
        )
        self.limits = limits_of(self.mesh.engine.modelled)
        self.fleet: list[Engines] = []
        self._model_ids = tuple(model.model_id for model in self.mesh.models)
        self.migrator: Migrator | None = None
        if spec.policy.migration == "llumnix":
            self.migrator = Migrator(self.world, self.fleet)
        self._booted = False
        self.followers = spec.policy.live
        self._peers = Peers()
        shapes = model_shapes(self.mesh) if spec.policy.live else {}
        self._shapes = tuple(shapes.values())
        self._memory = {name: Memory(shapes.get(name)) for name in self._model_ids}
        self._copies = Copies(self.mesh)
        self._add_services()
        for host in self.mesh.nodes:
            for gpu in host.gpu_specs():
                self.world.add(self._worker(host.node_id, gpu))

    def boot(self) -> None:
        """Bring up the first plan at once: how long that takes is no question of the trace."""
        self.world.run(math.nextafter(BOOT_S, 0.0))
        in_force = self.observer.in_force
        assert in_force is not None, "no plan came into force"
        assert in_force.replicas, f"the first plan has no replica: {in_force.reason}"
        self._booted = True
        self.observer.begin(BOOT_S)
        self.world.plan([dataclasses.replace(i, at_s=i.at_s + BOOT_S) for i in self.spec.incidents])

    def serve(self) -> float:
        """All of the traffic, until the last request has ended or ``drain_s`` has passed; when
        that was."""
        last_s = self.arrivals[-1].at_s if self.arrivals else BOOT_S
        end_s = last_s + self.spec.drain_s
        while self.world.now_s < end_s and not self.source.done:
            self.world.run(min(self.world.now_s + CHECK_S, end_s))
            for core in self.world.cores():
                core.check()
        self.observer.account(self.world.now_s)
        return max(last_s, self.source.last_end_s)

    def _halt(self) -> None:
        self.world.halted = True

    @property
    def engine_steps(self) -> int:
        running = sum(e.batch.steps_total for es in self.fleet for e in es.engines.values())
        return running + sum(engines.steps for engines in self.fleet)

    @property
    def preemptions(self) -> int:
        running = sum(e.batch.preemptions for es in self.fleet for e in es.engines.values())
        return running + sum(engines.preemptions for engines in self.fleet)

    # What engines are made of

    def batch(self, spec: ReplicaSpec, *, rank: int, cache_bytes_max: int) -> Batch:
        """With the KV cache that the old replicas leave room for, until it grows."""
        replica = modelled_replica(self.mesh, spec)
        if self._shapes:
            blocks = max(1, int(KV_SHARE_LIVE * replica.kv_blocks))
            replica = dataclasses.replace(replica, kv_blocks=blocks)
        block_bytes = replica.limits.block_tokens * self.memory(spec.model_id).token(spec, rank)
        if cache_bytes_max and block_bytes:
            blocks = max(1, min(replica.kv_blocks, cache_bytes_max // block_bytes))
            replica = dataclasses.replace(
                replica, kv_blocks=blocks, kv_blocks_full=replica.kv_blocks
            )
        return replica.new_batch()

    def start_s(self, spec: ReplicaSpec) -> float:
        """The first replicas are there when the trace begins."""
        if not self._booted:
            return BOOT_START_S
        start_s = self.spec.policy.start_s
        return modelled_replica(self.mesh, spec).start_s if start_s is None else start_s

    def memory(self, model_id: str) -> Memory:
        return self._memory[model_id]

    def prepare_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        """All of a start but the process, which is there: groups and graphs, then weights."""
        return self._copies.engine_start_s(worker_id) + self.copy_s(worker_id, byte_counts)

    def copy_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        return self._copies.seconds(worker_id, byte_counts)

    def facts(self, request: SubmitRequest) -> Facts:
        return self.source.facts(request.request_id)

    def tokens(self, request_id: str, position: int, count: int) -> list[int]:
        """Their number matters, what they say does not."""
        del request_id, position
        return [0] * count

    # The processes

    def _add_services(self) -> None:
        add, paces = self.world.add, self.paces
        add(self._simple("observer", lambda: self.observer, OBSERVED))
        add(self._simple("ingress", lambda: self.source, ingress.inputs(INGRESS)))
        add(
            NodeSpec(
                name="router",
                make=lambda _n, _p: (
                    router.Router(paces.router, models=self._model_ids, instance_id="router-0"),
                    {},
                ),
                inputs=router.INPUTS,
                queries=router.QUERIES,
            )
        )
        add(
            self._simple(
                "profiler",
                lambda: profiler.Profiler(
                    paces.profiler, models=self._model_ids, unix_offset_s=0.0
                ),
                profiler.INPUTS,
            )
        )
        add(self._forecaster())
        add(NodeSpec(name="scheduler", make=self._scheduler, inputs=self._scheduler_inputs()))
        add(NodeSpec(name="switcher", make=self._switcher, inputs=switcher.INPUTS))

    def _simple(
        self, name: str, make: Callable[[], Core], inputs: Sequence[subjects.Subject[Any]]
    ) -> NodeSpec:
        return NodeSpec(name=name, make=lambda _n, _p: (make(), {}), inputs=inputs)

    def _forecaster(self) -> NodeSpec:
        config = self.paces.forecaster
        if self.spec.forecast != "oracle":
            return self._simple(
                "forecaster",
                lambda: forecaster.Forecaster(config, unix_offset_s=0.0),
                forecaster.INPUTS,
            )
        oracle = Oracle(self.arrivals, horizon_windows=config.horizon_windows, unix_offset_s=0.0)
        return self._simple("forecaster", lambda: oracle, FORESEEN)

    def _scheduler_inputs(self) -> Sequence[subjects.Subject[Any]]:
        return scheduler.inputs(self.paces.scheduler.policy)

    def _switcher(self, _number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
        job = slow_job(plan_transfer, port, took_s=self.spec.slow_work_s)
        return switcher.Switcher(self.paces.switcher), {PLAN_TRANSFER: job}

    def _scheduler(self, _number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
        config = self.paces.scheduler
        policy = make_policy(config)
        job = slow_job(partial(solve, policy), port, took_s=self.spec.slow_work_s)
        return scheduler.Scheduler(config, self.mesh, policy), {"solve": job}

    def _worker(self, node_id: str, gpu: GpuSpec) -> NodeSpec:
        worker_id = gpu.gpu_id
        config = msgspec.structs.replace(self.paces.worker, worker_id=worker_id)

        def make(number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
            incarnation = f"{worker_id}-{number}"
            identity = WorkerIdentity(
                worker_id=worker_id,
                incarnation=incarnation,
                node_id=node_id,
                gpu=with_memory(self.mesh, gpu),
                models=self._model_ids,
                peer=incarnation,
                shapes=self._shapes,
                followers=self.followers,
            )
            pulse = None
            if self.paces.pulse_s is not None:
                pulse = Pulse(port, report_s=config.report_s, keepalive_s=self.paces.pulse_s)
            engines = Engines(
                port,
                incarnation=incarnation,
                workshop=self,
                rng=random.Random(f"engine/{self.spec.seed}/{incarnation}"),
                peers=self._peers,
                pulse=pulse,
            )
            self.fleet.append(engines)
            return Streaming(WorkerCore(config, identity), engines), engines.jobs()

        inputs = tuple(subject.of(worker_id=worker_id) for subject in WORKER_INPUTS)
        return NodeSpec(name=worker_id, make=make, inputs=inputs)


def _merged(traffic: Sequence[Traffic]) -> Iterator[Arrival]:
    """The arrivals of all models, by time, on the world's clock."""

    def of(one: Traffic) -> Iterator[Arrival]:
        for record in one.records:
            yield Arrival(BOOT_S + record.timestamp_s, one.model_id, record)

    return heapq.merge(*(of(one) for one in traffic), key=lambda arrival: arrival.at_s)
