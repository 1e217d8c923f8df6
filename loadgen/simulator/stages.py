"""Layers of simulated replicas that come and go in stages: old and new do not fit together."""

from typing import Protocol

from loadgen.simulator.engine import Engine
from loadgen.simulator.peers import Peers
from loadgen.simulator.process import Port
from loadgen.simulator.workshop import Workshop
from services.worker.events import EngineStage, EngineStaged


class Hosts(Protocol):
    """Of the process's engines, what stages need."""

    engines: dict[str, Engine]

    @property
    def port(self) -> Port: ...


class Stages:
    def __init__(self, hosts: Hosts, peers: Peers, workshop: Workshop) -> None:
        self._hosts, self._peers, self._workshop = hosts, peers, workshop

    def stage(self, stage: EngineStage) -> None:
        """The leader has all ranks do their part. Who cannot be reached is missed elsewhere."""
        engine = self._hosts.engines.get(stage.replica_id)
        if engine is None or engine.generation != stage.generation or engine.broken:
            return
        came: dict[str, int] = {}
        took_s = 0.0
        for worker_id in engine.spec.gpus:
            rank = engine
            if worker_id != engine.spec.gpus[0]:
                place = self._peers.at(engine.start.peers.get(worker_id, ""))
                known = None if place is None else place.engines.get(engine.replica_id)
                if known is None or known.broken:
                    continue
                rank = known
            fetched = self._stage_rank(rank, stage)
            took_s = max(took_s, self._workshop.copy_s(worker_id, fetched))
            for source, size in fetched.items():
                came[source] = came.get(source, 0) + size
        staged = EngineStaged(
            replica_id=engine.replica_id,
            generation=engine.generation,
            stage=stage.stage,
            bytes_by_source=came,
        )
        self._hosts.port.feed(staged, delay_s=took_s)

    def _stage_rank(self, rank: Engine, stage: EngineStage) -> dict[str, int]:
        memory = self._workshop.memory(rank.spec.model_id)
        if stage.layers[0] < stage.layers[1]:
            rank.weight_bytes -= memory.layers(rank.spec, rank.start.rank, stage.layers)
            return {}
        came = memory.by_source(rank.start.copies, stage=stage.stage)
        rank.weight_bytes += sum(came.values())
        for source, size in came.items():
            rank.fetched[source] = rank.fetched.get(source, 0) + size
        return came
