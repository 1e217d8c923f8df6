"""The start of a rank of a simulated engine, and what happens when another rank is lost."""

import random
from collections.abc import Iterator
from typing import Protocol

from loadgen.simulator.engine import Engine
from loadgen.simulator.peers import PATIENCE_S, Peers
from loadgen.simulator.process import Port
from loadgen.simulator.workshop import Workshop
from services.worker.events import EngineGrow, EngineReady
from shared.placement.copies import DISK

JOIN_S = 3.0
"""How long a rank that has its weights waits for the others."""
LOOK_S = 0.1


class Hosts(Protocol):
    """Of the process's engines, what ranks need."""

    engines: dict[str, Engine]

    @property
    def port(self) -> Port: ...

    def break_down(self, engine: Engine, detail: str) -> None: ...
    def resume(self, engine: Engine) -> None: ...


class Ranks:
    def __init__(self, hosts: Hosts, peers: Peers, workshop: Workshop, rng: random.Random) -> None:
        self._hosts, self._peers = hosts, peers
        self._workshop, self._rng = workshop, rng

    def start(self, engine: Engine) -> None:
        """Load its weights from where ``copies`` say, or from disk; then meet the other ranks."""
        start, memory = engine.start, self._workshop.memory(engine.spec.model_id)
        sources = memory.by_source(start.copies, stage=0)
        if start.copies:
            worker_id = engine.spec.gpus[start.rank]
            took_s = self._workshop.prepare_s(worker_id, sources)
            engine.weight_bytes = sum(sources.values())
        else:
            took_s = self._workshop.start_s(engine.spec)
            engine.weight_bytes = memory.weights(engine.spec, start.rank)
            sources = {DISK: engine.weight_bytes}
        engine.fetched = sources
        block_bytes = engine.batch.kv.block_tokens * memory.token(engine.spec, start.rank)
        engine.cache_bytes = engine.batch.kv.total * block_bytes
        engine.cache_bytes_full = engine.batch.blocks_full * block_bytes
        faults = self._workshop.faults
        if self._rng.random() < faults.start_hangs:
            return
        fails = self._rng.random() < faults.start_fails

        def loaded() -> None:
            if self._gone(engine):
                return
            lost = next(self._lost_sources(engine), "")
            if fails:
                lost = "out of memory while loading weights (injected)"
            if lost:
                self._hosts.break_down(engine, lost)
            else:
                self._meet(engine, took_s, until_s=self._hosts.port.now_s + JOIN_S)

        self._hosts.port.later(took_s, loaded)

    def _meet(self, engine: Engine, took_s: float, *, until_s: float) -> None:
        if self._gone(engine):
            return
        port = self._hosts.port
        missing = self.missing(engine)
        if not missing:
            engine.ready = True
            engine.group = self._group(engine)
            if len(engine.spec.gpus) > 1:
                port.later(PATIENCE_S / 2, lambda: self._watch(engine, None))
            port.feed(
                EngineReady(
                    replica_id=engine.replica_id,
                    generation=engine.generation,
                    bytes_by_source=dict(engine.fetched),
                    took_s=took_s,
                    cache_bytes=engine.cache_bytes,
                    cache_bytes_full=engine.cache_bytes_full,
                )
            )
        elif port.now_s >= until_s:
            self._hosts.break_down(engine, f"no sign of {missing}")
        else:
            port.later(LOOK_S, lambda: self._meet(engine, took_s, until_s=until_s))

    def _watch(self, engine: Engine, since_s: float | None) -> None:
        """Whoever is not heard of for PATIENCE_S is lost, and all of the replica with it."""
        if self._gone(engine):
            return
        port = self._hosts.port
        missing = self.missing(engine)
        if not missing:
            since_s = None
        elif since_s is None:
            since_s = port.now_s
        elif port.now_s - since_s >= PATIENCE_S:
            self._hosts.break_down(engine, f"{missing} is lost")
            return
        port.later(PATIENCE_S / 2, lambda: self._watch(engine, since_s))

    def grow(self, grow: EngineGrow) -> None:
        """Give the KV cache of all ranks its full size; put off while one of them is not to be
        seen, or requests are taken over."""
        engine = self._hosts.engines.get(grow.replica_id)
        if engine is None or engine.generation != grow.generation or engine.broken:
            return
        if engine.held is None and not self.missing(engine):
            for rank in (engine, *engine.group.values()):
                rank.batch.grow()
                rank.cache_bytes = rank.cache_bytes_full
            self._hosts.resume(engine)  # somebody may have waited for it

    def missing(self, engine: Engine) -> str:
        """A rank of the replica that is not to be seen; "" if all are. Once they have met, nobody
        else will do."""
        if not self._workshop.followers:
            return ""
        for rank, worker_id in enumerate(engine.spec.gpus):
            address = engine.start.peers.get(worker_id, "")
            if rank == engine.start.rank:
                continue
            place = self._peers.at(address)
            other = None if place is None else place.engines.get(engine.replica_id)
            if (
                other is None
                or not _belong_together(engine, other)
                or self._peers.silence_s(self._hosts.port, address)
            ):
                return f"rank {rank} on {worker_id}"
        return ""

    def _group(self, engine: Engine) -> dict[int, Engine]:
        """The other ranks, all of which are to be seen."""
        group: dict[int, Engine] = {}
        if not self._workshop.followers:
            return group
        for rank, worker_id in enumerate(engine.spec.gpus):
            place = self._peers.at(engine.start.peers.get(worker_id, ""))
            if rank != engine.start.rank and place is not None:
                group[rank] = place.engines[engine.replica_id]
        return group

    def _lost_sources(self, engine: Engine) -> Iterator[str]:
        for source in sorted({copy.source for copy in engine.start.copies} - {DISK}):
            address = engine.start.peers.get(source, "")
            if self._peers.silence_s(self._hosts.port, address) >= PATIENCE_S:
                yield f"{source} does not answer"

    def _gone(self, engine: Engine) -> bool:
        return engine.broken or self._hosts.engines.get(engine.replica_id) is not engine


def _belong_together(one: Engine, other: Engine) -> bool:
    if other.broken or other.spec != one.spec:
        return False
    met = one.group.get(other.start.rank, other) is other
    return met and other.group.get(one.start.rank, one) is one
