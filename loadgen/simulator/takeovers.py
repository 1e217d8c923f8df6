"""Requests that go on in another simulated replica, with their KV cache."""

import random
from collections.abc import Iterator, Mapping
from typing import Protocol

import msgspec

from loadgen.simulator.engine import Engine, Held, Outgoing, Run
from loadgen.simulator.peers import PATIENCE_S, Peers
from loadgen.simulator.process import Job, Port
from loadgen.simulator.workshop import Workshop
from services.worker.events import (
    EXPECT,
    PAUSE_ENGINE,
    RELEASE,
    RESUME_ENGINE,
    TAKE,
    EngineExpect,
    EnginePause,
    EnginePaused,
    EngineRelease,
    EngineReleased,
    EngineResume,
    EngineTake,
    EngineTook,
    LiveAttempt,
)
from shared.errors import Rejected
from shared.messages.requests import SubmitRequest
from shared.placement.spread import target_of

LOOK_S = 0.05


class Hosts(Protocol):
    """Of the process's engines, what takeovers need."""

    engines: dict[str, Engine]

    @property
    def port(self) -> Port: ...

    def resume(self, engine: Engine) -> None: ...
    def refuse(self, request: SubmitRequest, error: Rejected) -> None: ...
    def show(self, engine: Engine, run: Run, out: Outgoing, *, done: int = 0) -> None: ...


class Takeovers:
    def __init__(self, hosts: Hosts, peers: Peers, workshop: Workshop, rng: random.Random) -> None:
        self._hosts, self._peers = hosts, peers
        self._workshop, self._rng = workshop, rng

    def jobs(self) -> Mapping[str, Job]:
        return {
            EXPECT: self._expect,
            PAUSE_ENGINE: self._pause,
            RESUME_ENGINE: self._resume,
            TAKE: self._take,
            RELEASE: self._release,
        }

    def stand_still(self, engine: Engine) -> None:
        """At a step boundary: everything that was made is shown."""
        out = Outgoing()
        for run in engine.runs.values():
            self._hosts.show(engine, run, out)
        out.send()
        engine.stance, engine.paused_s = "paused", self._hosts.port.now_s
        engine.moving = frozenset(engine.runs)
        self._say_paused(engine)

    def _say_paused(self, engine: Engine) -> None:
        moving: dict[str, str] = {}
        for key in sorted(engine.moving & engine.runs.keys()):
            request, shares = engine.runs[key].request, engine.shares
            target = target_of(request.request_id, request.request_type, shares.rows)
            if target:
                moving[request.request_id] = shares.leaders[target]
        self._hosts.port.feed(
            EnginePaused(replica_id=engine.replica_id, generation=engine.generation, moving=moving)
        )

    def _expect(self, expect: EngineExpect) -> None:
        """What comes ahead would shorten a pause: here all KV cache is copied in the pause."""

    def _pause(self, pause: EnginePause) -> None:
        engine = self._engine(pause.replica_id, pause.generation)
        if engine is None:
            return
        engine.shares = pause.shares
        if engine.stance == "paused":
            self._say_paused(engine)
            return
        engine.stance = "pausing"
        self._hosts.resume(engine)

    def _resume(self, resume: EngineResume) -> None:
        engine = self._engine(resume.replica_id, resume.generation)
        if engine is not None and engine.stance != "running":
            engine.stance, engine.moving = "running", frozenset()
            self._hosts.resume(engine)

    def _take(self, take: EngineTake) -> None:
        engine = self._engine(take.replica_id, take.generation)
        if engine is None:
            return
        self._forget(engine)
        engine.takes += 1
        number, began_s = engine.takes, self._hosts.port.now_s

        def look() -> None:
            """Until all sources stand still and answer; then copy for as long as it takes."""
            if self._void(engine, number):
                return
            problem, tokens = self._look(take)
            if not problem:
                copied_s = self._copy_s(engine, tokens)
                self._hosts.port.later(
                    copied_s, lambda: self._arrive(engine, take, number, began_s)
                )
            elif self._hosts.port.now_s - began_s >= PATIENCE_S:
                self._took(engine, take, began_s, failure=problem)
            else:
                self._hosts.port.later(LOOK_S, look)

        look()

    def _look(self, take: EngineTake) -> tuple[str, Mapping[str, int]]:
        """Why requests cannot be taken now; or the tokens of KV cache that come with them, by the
        worker that has them."""
        tokens: dict[str, int] = {}
        for source_id, worker_id in sorted(take.sources.items()):
            source = self._source(take, source_id, worker_id)
            if isinstance(source, str):
                return source, {}
            computed = sum(source.batch.computed(r.sequence) for r in self._share(source, take))
            tokens[worker_id] = tokens.get(worker_id, 0) + computed
        return "", tokens

    def _source(self, take: EngineTake, source_id: str, worker_id: str) -> Engine | str:
        """The engine that stands still there, or why there is none."""
        address = take.peers.get(worker_id, "")
        place = self._peers.at(address)
        if place is None:
            return f"{worker_id} is gone"
        if self._peers.silence_s(self._hosts.port, address):
            return f"{worker_id} does not answer"
        source = place.engines.get(source_id)
        if source is None or source.broken:
            return f"{worker_id} does not run {source_id} any more"
        if source.stance != "paused":
            return f"{source_id} does not stand still"
        return source

    def _share(self, source: Engine, take: EngineTake) -> Iterator[Run]:
        """The runs of ``source`` that the taking replica is to have, oldest first."""
        for sequence in (*source.batch.running.values(), *source.batch.waiting.values()):
            run = source.runs.get(sequence.key)
            if run is None or sequence.key not in source.moving:
                continue
            request = run.request
            target = target_of(request.request_id, request.request_type, take.shares.rows)
            if target == take.replica_id:
                yield run

    def _copy_s(self, engine: Engine, tokens: Mapping[str, int]) -> float:
        """All ranks copy side by side, and the leader as long as any."""
        token_bytes = self._workshop.memory(engine.spec.model_id).token(engine.spec, 0)
        byte_counts = {worker_id: count * token_bytes for worker_id, count in tokens.items()}
        return self._workshop.copy_s(engine.spec.gpus[0], byte_counts)

    def _arrive(self, engine: Engine, take: EngineTake, number: int, began_s: float) -> None:
        if self._void(engine, number):
            return
        if self._rng.random() < self._workshop.faults.take_fails:
            self._took(engine, take, began_s, failure="a checksum does not match (injected)")
            return
        sources: list[Engine] = []
        for source_id, worker_id in sorted(take.sources.items()):
            source = self._source(take, source_id, worker_id)
            if isinstance(source, str):
                self._took(engine, take, began_s, failure=source)
                return
            sources.append(source)
        engine.held = Held(take.epoch)
        replayed, tokens = 0, dict[str, int]()
        for source in sources:
            runs = list(self._share(source, take))
            engine.held.paused_s.append((source.paused_s, len(runs)))
            for run in runs:
                came = self._hold(engine, engine.held, run, source)
                replayed += came is None
                worker_id = source.spec.gpus[0]
                tokens[worker_id] = tokens.get(worker_id, 0) + (came or 0)
        self._took(engine, take, began_s, replayed=replayed, tokens=tokens)

    def _hold(self, engine: Engine, held: Held, run: Run, source: Engine) -> int | None:
        """Tokens whose KV came with it; None if it has to be computed anew."""
        key, computed = run.sequence.key, source.batch.computed(run.sequence)
        try:
            sequence = engine.batch.hold(
                key,
                prompt_tokens=run.sequence.prompt_tokens,
                output_tokens=run.output_tokens,
                earlier_tokens=run.shown,
                computed_tokens=computed,
            )
        except Rejected as error:
            held.refused.append((run.request, error))
            return None
        request = msgspec.structs.replace(run.request, replica_id=engine.replica_id)
        held.runs[key] = Run(request, sequence, run.shown, run.output_tokens, engine)
        return sequence.computed if sequence.computed or not computed else None

    def _took(  # what a report of it consists of
        self,
        engine: Engine,
        take: EngineTake,
        began_s: float,
        *,
        replayed: int = 0,
        tokens: Mapping[str, int] | None = None,
        failure: str = "",
    ) -> None:
        held = engine.held
        requests = [] if held is None else [run.request for run in held.runs.values()]
        refused = [] if held is None else [request for request, _ in held.refused]
        memory = self._workshop.memory(engine.spec.model_id)
        size = memory.token_everywhere(engine.spec)
        own = engine.spec.gpus[0]
        copied = {source: count * size for source, count in (tokens or {}).items()}
        self._hosts.port.feed(
            EngineTook(
                replica_id=engine.replica_id,
                generation=engine.generation,
                epoch=take.epoch,
                taken=tuple(_live(request) for request in (*requests, *refused)),
                moved=len(requests) + len(refused) - replayed,
                replayed=replayed,
                bytes_by_source={own: copied},
                bytes_needed=sum(count for source, count in copied.items() if source != own),
                took_s=self._hosts.port.now_s - began_s,
                detail="the KV cache has no room for them" if replayed else "",
                failure=failure,
            )
        )

    def _release(self, release: EngineRelease) -> None:
        engine = self._engine(release.replica_id, release.generation)
        if engine is None:
            return
        engine.takes += 1
        held, pauses = engine.held, list[tuple[float, int]]()
        if held is None or not release.keep or held.epoch != release.epoch:
            self._forget(engine)
        else:
            engine.held = None
            engine.batch.release(keep=True)
            engine.runs.update(held.runs)
            for request, error in held.refused:
                self._hosts.refuse(request, error)
            now_s = self._hosts.port.now_s
            pauses = [(now_s - paused_s, count) for paused_s, count in held.paused_s if count]
            self._hosts.resume(engine)
        self._hosts.port.feed(
            EngineReleased(
                replica_id=engine.replica_id,
                generation=engine.generation,
                epoch=release.epoch,
                pauses=tuple(pauses),
            )
        )

    def _forget(self, engine: Engine) -> None:
        engine.held = None
        engine.batch.release(keep=False)

    def _void(self, engine: Engine, number: int) -> bool:
        known = self._hosts.engines.get(engine.replica_id)
        return known is not engine or engine.broken or engine.takes != number

    def _engine(self, replica_id: str, generation: int) -> Engine | None:
        engine = self._hosts.engines.get(replica_id)
        alive = engine is not None and engine.generation == generation and not engine.broken
        return engine if alive else None


def _live(request: SubmitRequest) -> LiveAttempt:
    return LiveAttempt(
        request_id=request.request_id,
        attempt=request.attempt,
        ingress_id=request.ingress_id,
        key=f"{request.request_id}/{request.attempt}",
    )
