"""The side of a switch that takes: KV cache ahead of the pause, then the requests themselves.

A task at a time: it asks the old leaders what they have, picks what falls to this replica, and has
the engine copy it between two of its steps.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from services.worker.attempts import Attempt, arrives_as
from services.worker.between import Between
from services.worker.engine.interface import Engine, LiveState, Taken
from services.worker.events import (
    EngineExpect,
    EngineRelease,
    EngineReleased,
    EngineStage,
    EngineStaged,
    EngineTake,
    EngineTook,
)
from services.worker.handover import topic_of
from services.worker.host_context import HostContext
from services.worker.peers.link import ask
from shared.errors import EngineFailed, PeerLost
from shared.messages.base import decode
from shared.messages.replicas import Shares
from shared.messages.requests import RequestState, RequestStates

log = logging.getLogger("oserve.worker")

ASK_S_MAX = 2.0  # for one answer of an old leader
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
    """An old replica that stands still: what of it falls to us, since when it makes no step."""

    replica_id: str
    states: list[RequestState]
    paused_s: float


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
        self._tally = _Tally()
        self.fetched_bytes = 0  # of weights, from elsewhere
        self._task: asyncio.Task[None] | None = None

    def expect(self, order: EngineExpect) -> None:
        self._cancel()
        self._tally = _Tally()
        self._between.post(lambda engine: _expect(engine, order))
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
            now_s = self._clock.now_s()
            released = EngineReleased(
                replica_id=self._replica_id,
                generation=self._generation,
                epoch=order.epoch,
                pauses=tuple((now_s - since_s, count) for since_s, count in pauses),
            )
            self._feed(released)

        self._between.post(lambda engine: engine.release(keep=True), told)
        return sum(key in self._live for key in held)

    def advance_stage(self, order: EngineStage) -> None:
        """EngineStaged follows."""

        def advance(engine: Engine) -> dict[str, int]:
            before = dict(engine.fetched)
            engine.advance_stage(order.stage, order.layers)
            return {source: n - before.get(source, 0) for source, n in engine.fetched.items()}

        def told(fetched: dict[str, int]) -> None:
            self.fetched_bytes += from_elsewhere(fetched, self._config.worker_id)
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
                    answer = await self._ask(replica_id, order.peers.get(worker_id, ""))
                    states = [arrives_as(state) for state in self._ours(answer, order.shares)]
                    await self._copy(replica_id, states, final=False)
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
                sources = [await self._standing(name, order) for name in order.sources]
            for source in sources:
                states = [arrives_as(state) for state in source.states]
                taken = await self._copy(source.replica_id, states, final=True)
                moved, replayed = moved + len(taken.moved), replayed + len(taken.replayed)
                details |= {taken.detail} - {""}
                known = {state.request.key for state in states}
                ours = known & {*taken.moved, *taken.replayed}
                found = (Attempt.of(state) for state in source.states)
                attempts |= {attempt.key: attempt for attempt in found if attempt.key in ours}
                pauses.append((source.paused_s, len(ours)))
        except (PeerLost, TimeoutError) as error:
            self._between.post(lambda engine: engine.release(keep=False))
            words = (
                str(error) or f"no old leader stood still within {self._config.take_timeout_s} s"
            )
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
        """What falls to us of a source, once it stands still."""
        address = order.peers.get(order.sources[replica_id], "")
        while True:
            answer = await self._ask(replica_id, address)
            if answer.paused:
                since_s = self._clock.now_s() - answer.paused_for_s
                return _Source(replica_id, self._ours(answer, order.shares), since_s)
            await asyncio.sleep(POLL_S)

    def _ours(self, answer: RequestStates, shares: Shares) -> list[RequestState]:
        mine = self._replica_id
        return [s for s in answer.states if Attempt.of(s).target(shares.rows) == mine]

    async def _copy(self, replica_id: str, states: list[LiveState], *, final: bool) -> Taken:
        tally = self._tally

        def copy(engine: Engine) -> Taken:
            return tally.add(engine.take(replica_id, states, final=final), final=final)

        return await self._between.do(copy)

    async def _ask(self, replica_id: str, address: str) -> RequestStates:
        """Raises PeerLost."""
        if not address:
            raise PeerLost(f"nobody said where the leader of {replica_id} is reached")
        answer = await asyncio.to_thread(ask, address, topic_of(replica_id), timeout_s=ASK_S_MAX)
        try:
            return decode(answer, RequestStates)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise PeerLost(f"the leader of {replica_id} answers in other words: {error}") from error


def from_elsewhere(fetched: Mapping[str, int], worker_id: str) -> int:
    """Of bytes by source, those that were not on ``worker_id`` already."""
    return sum(count for source, count in fetched.items() if source != worker_id)


def _expect(engine: Engine, order: EngineExpect) -> None:
    try:
        engine.expect(order.copies, order.peers, verify=order.verify)
    except PeerLost as error:  # nothing is lost yet: the taking will tell
        fields = {"replica_id": order.replica_id, "error": str(error)}
        log.warning("expect.failed", extra=fields)
