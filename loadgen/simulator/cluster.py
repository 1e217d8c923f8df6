"""A whole mesh in virtual time, wired as in production, that serves traces."""

import dataclasses
import heapq
import math
import random
from collections.abc import Iterator, Mapping

import msgspec

from loadgen.simulator import source as ingress
from loadgen.simulator.engines import Engines, Facts
from loadgen.simulator.faults import Weather
from loadgen.simulator.jobs import slow_job
from loadgen.simulator.observer import INPUTS as OBSERVED
from loadgen.simulator.observer import Observer
from loadgen.simulator.oracle import INPUTS as FORESEEN
from loadgen.simulator.oracle import Oracle
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.paces import paces
from loadgen.simulator.process import Job, NodeSpec, Port
from loadgen.simulator.pulse import Pulse
from loadgen.simulator.source import Arrival, Source
from loadgen.simulator.streaming import Streaming
from loadgen.simulator.world import World
from services.forecaster import core as forecaster
from services.profiler import core as profiler
from services.router import core as router
from services.scheduler import core as scheduler
from services.scheduler.solving import SOLVE, solve
from services.switcher import core as switcher
from services.worker.core import WorkerCore
from services.worker.engine.batching import Batch
from services.worker.engine.modelled_timing import modelled_replica
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
WORKER_COMMANDS = (
    subjects.START_REPLICA,
    subjects.DRAIN_REPLICA,
    subjects.STOP_REPLICA,
    subjects.RESUME_REPLICA,
    subjects.SUBMIT_REQUEST,
    subjects.ABORT_REQUEST,
)


class Cluster:
    """See run.run for how it is used. It is its engines' workshop."""

    streaming = False

    def __init__(self, spec: SimulationSpec) -> None:
        self.spec = spec
        self.mesh = spec.mesh.checked()
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
        )
        self.fleet: list[Engines] = []
        self._model_ids = tuple(model.model_id for model in self.mesh.models)
        self._booted = False
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
        self.observer.account(BOOT_S)
        self.observer.gpu_seconds = 0.0
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
        ended_s = max(last_s, self.source.last_end_s)
        self.observer.account(self.world.now_s)
        return ended_s

    @property
    def engine_steps(self) -> int:
        running = sum(e.batch.steps_total for es in self.fleet for e in es.engines.values())
        return running + sum(engines.steps for engines in self.fleet)

    @property
    def preemptions(self) -> int:
        running = sum(e.batch.preemptions for es in self.fleet for e in es.engines.values())
        return running + sum(engines.preemptions for engines in self.fleet)

    # What engines are made of

    @property
    def limits(self):
        return self._limits

    def batch(self, spec: ReplicaSpec) -> Batch:
        return modelled_replica(self.mesh, spec).new_batch()

    def start_s(self, spec: ReplicaSpec) -> float:
        """The first replicas are there when the trace begins."""
        if not self._booted:
            return BOOT_START_S
        start_s = self.spec.policy.start_s
        return modelled_replica(self.mesh, spec).start_s if start_s is None else start_s

    def facts(self, request: SubmitRequest) -> Facts:
        return self.source.facts(request.request_id)

    def tokens(self, request_id: str, position: int, count: int) -> list[int]:
        """Their number matters, what they say does not."""
        del request_id, position
        return [0] * count
