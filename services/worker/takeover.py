"""The side of a switch that takes: KV cache ahead of the pause, then the requests themselves.

A task at a time: it asks the old leaders what they have, picks what falls to this replica, and has
the engine copy it between two of its steps.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from services.worker.attempts import Attempt
from services.worker.between import Between
from services.worker.engine.interface import Engine, Taken
from services.worker.events import (
    EngineExpect,
    EngineRelease,
    EngineReleased,
    EngineStage,
    EngineStaged,
    EngineTake,
    EngineTook,
)
from services.worker.host_context import HostContext
from services.worker.states import Answer, StatesWanted, ask_leader
from shared.errors import EngineFailed, PeerLost

log = logging.getLogger("oserve.worker")

POLL_S = 0.005  # between questions whether it stands still
Bytes = dict[str, dict[str, int]]


@dataclass(slots=True)
class _Tally:
    """What has been copied for one switch: target worker -> source worker -> bytes. ``ahead`` of
    them before the pause; ``needed`` as in Taken."""

    copied: Bytes = field(default_factory=dict[str, dict[str, int]])
    total: int = 0
    ahead: int = 0
    needed: int = 0

    def add(self, taken: Taken, *, final: bool) -> Taken:
        """Where the engine is stepped: what was copied counts even if nobody waits for it."""
        for target, sources in taken.bytes_by_source.items():
            row = self.copied.setdefault(target, {})
            for source, count in sources.items():
                row[source] = row.get(source, 0) + count
                self.total += count
        self.needed += taken.bytes_needed
        if not final:
            self.ahead = self.total
        return taken


@dataclass(frozen=True, slots=True)
class _Source:
    """An old replica that stands still since ``paused_s``, or why nothing is had from it."""

    replica_id: str
    answer: Answer | None = None
    paused_s: float = 0.0
    failure: str = ""


class Takeover:
    """``live``: the host's attempts by their engine's keys, those held included."""

    def __init__(
        self,
        replica_id: str,
        generation: int,
        between: Between,
        context: HostContext,
        live: dict[str, Attempt],
    ) -> None:
        self._replica_id, self._generation, self._between = replica_id, generation, between
        self._config, self._clock = context.config, context.clock
        self._tasks, self._feed = context.tasks, context.feed
        self._live = live
        self._held: list[str] = []
        self._pauses: list[tuple[float, int]] = []  # (since when, requests)
        self._going_on: EngineReleased | None = None  # to be told after the next step
        self._tally = _Tally()
        self._task: asyncio.Task[None] | None = None

    def expect(self, order: EngineExpect) -> None:
        self._cancel()
        self._tally = _Tally()
        self._between.post(
            lambda engine: engine.expect(order.copies, order.peers, verify=order.verify)
        )
        self._task = self._tasks.create_task(self._copy_ahead(order))

    def take(self, order: EngineTake) -> None:
        self._cancel()
        self._task = self._tasks.create_task(self._take(order))

    def release(self, order: EngineRelease) -> int:
        """How many requests go on."""
        self._cancel()
        held, self._held = self._held, []
        pauses, self._pauses = self._pauses, []
        if not order.keep:
            for key in held:
                self._live.pop(key, None)
            self._between.post(lambda engine: engine.release(keep=False))
            return 0

        def told(_: None) -> None:
            self._going_on = EngineReleased(
                replica_id=self._replica_id,
                generation=self._generation,
                epoch=order.epoch,
                pauses=tuple((since_s, count) for since_s, count in pauses if count),
            )

        self._between.post(lambda engine: engine.release(keep=True), told)
        return sum(key in self._live for key in held)

    def stepped(self) -> None:
        """A step has ended and its chunks are sent, or there was nothing to do: for requests that
        were let go on before it, the pause is over."""
        released, self._going_on = self._going_on, None
        if released is not None:
            now_s = self._clock.now_s()
            pauses = tuple((now_s - since_s, count) for since_s, count in released.pauses)
            self._feed(msgspec.structs.replace(released, pauses=pauses))

    def advance_stage(self, order: EngineStage) -> None:
        """EngineStaged follows."""

        def advance(engine: Engine) -> dict[str, int]:
            before = dict(engine.fetched)
            engine.advance_stage(order.stage, order.layers)
            return {source: n - before.get(source, 0) for source, n in engine.fetched.items()}

        def told(fetched: dict[str, int]) -> None:
            staged = EngineStaged(
                replica_id=self._replica_id,
                generation=self._generation,
                stage=order.stage,
                bytes_by_source={source: n for source, n in fetched.items() if n},
            )
            self._feed(staged)

        self._between.post(advance, told)

    def grow(self) -> None:
        """What is measured tells of it."""
        self._between.post(lambda engine: engine.grow_cache())

    def close(self) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _copy_ahead(self, order: EngineExpect) -> None:
        told: set[str] = set()
        while True:
            for replica_id, worker_id in order.sources.items():
                try:
                    address = order.peers.get(worker_id, "")
                    wanted = StatesWanted(self._replica_id, order.shares.rows, whole=False)
                    answer = await ask_leader(replica_id, address, wanted)
                    await self._copy(replica_id, answer, final=False)
                except PeerLost as error:
                    if replica_id not in told:  # the pause will tell whether it is gone for good
                        told.add(replica_id)
                        fields = {"replica_id": replica_id, "error": str(error)}
                        log.warning("ahead.failed", extra=fields)
                except EngineFailed:
                    return  # its host tells
            await asyncio.sleep(self._config.ahead_s)

    async def _take(self, order: EngineTake) -> None:
        began_s = self._clock.now_s()
        moved = replayed = 0
        attempts: dict[str, Attempt] = {}
        details: set[str] = set()
        pauses: list[tuple[float, int]] = []
        try:
            async with asyncio.timeout(self._config.take_timeout_s):
                sources = await asyncio.gather(
                    *(self._standing(name, order) for name in order.sources)
                )
            for source in sources:
                taken = await self._take_from(source)
                details |= {taken.detail} - {""}
                moved, replayed = moved + len(taken.moved), replayed + len(taken.replayed)
                if source.answer is not None:
                    known = source.answer.attempts
                    ours = known.keys() & {*taken.moved, *taken.replayed}
                    attempts |= {key: known[key] for key in known if key in ours}
                    pauses.append((source.paused_s, len(known.keys() & {*taken.moved})))
        except TimeoutError:
            self._between.post(lambda engine: engine.release(keep=False))
            words = f"an old leader did not stand still within {self._config.take_timeout_s} s"
            self._feed(self._took(order, failure=words))
            return
        except EngineFailed:
            return  # its host tells
        self._live.update(attempts)
        self._held, self._pauses = list(attempts), pauses
        took = self._took(order)
        self._feed(
            msgspec.structs.replace(
                took,
                taken=tuple(attempt.told(key) for key, attempt in attempts.items()),
                moved=moved,
                replayed=replayed,
                bytes_by_source=self._tally.copied,
                ahead_bytes=self._tally.ahead,
                bytes_needed=self._tally.needed,
                took_s=self._clock.now_s() - began_s,
                detail="; ".join(sorted(details)),
            )
        )

    def _took(self, order: EngineTake, *, failure: str = "") -> EngineTook:
        return EngineTook(
            replica_id=self._replica_id,
            generation=self._generation,
            epoch=order.epoch,
            failure=failure,
        )

    async def _standing(self, replica_id: str, order: EngineTake) -> _Source:
        """What falls to us of a source, once it stands still. Of one that cannot be reached that
        is nothing: its requests are tried elsewhere once its heartbeats stop."""
        address = order.peers.get(order.sources[replica_id], "")
        wanted = StatesWanted(self._replica_id, order.shares.rows, whole=True)
        try:
            while True:
                answer = await ask_leader(replica_id, address, wanted)
                if answer.head.paused:
                    since_s = self._clock.now_s() - answer.head.paused_for_s
                    return _Source(replica_id, answer, since_s)
                await asyncio.sleep(POLL_S)
        except PeerLost as error:
            return _Source(replica_id, failure=str(error))

    async def _take_from(self, source: _Source) -> Taken:
        """``detail`` says why there is nothing."""
        failure = source.failure
        if source.answer is not None:
            try:
                return await self._copy(source.replica_id, source.answer, final=True)
            except PeerLost as error:
                failure = str(error)
        fields = {"replica_id": source.replica_id, "error": failure}
        log.warning("take.source_lost", extra=fields)
        return Taken(detail=f"nothing from {source.replica_id}: {failure}")

    async def _copy(self, replica_id: str, answer: Answer, *, final: bool) -> Taken:
        """Blocks of another size cannot be copied: such requests are computed anew."""
        tally, theirs = self._tally, answer.head.block_tokens

        def copy(engine: Engine) -> Taken:
            if theirs == engine.block_tokens:
                taken = engine.take(replica_id, answer.states, final=final)
                return tally.add(taken, final=final)
            if not final:
                return Taken()
            bare = [replace(state, computed=0, blocks=[]) for state in answer.states]
            taken = engine.take(replica_id, bare, final=True)
            sizes = f"{replica_id} has KV blocks of {theirs} tokens, and we of"
            return Taken(
                replayed=[*taken.moved, *taken.replayed],
                detail=f"{sizes} {engine.block_tokens}: give both the same block_tokens",
            )

        return await self._between.do(copy)


def from_elsewhere(fetched: Mapping[str, int], worker_id: str) -> int:
    """Of bytes by source, those that were not on ``worker_id`` already."""
    return sum(count for source, count in dict(fetched).items() if source != worker_id)
