"""Runs this worker's rank of a replica that another worker leads.

The rank does what its leader says, in a thread of its own; here it is only begun and ended.
"""

import asyncio
import logging
from contextlib import suppress

from services.worker.engine.factory import Building
from services.worker.engine.interface import EngineLoad, Follower
from services.worker.engine_thread import EngineThread, StartGivenUp, go_on
from services.worker.events import (
    EngineBroken,
    EngineExpect,
    EngineReady,
    EngineStart,
    EngineStopped,
    MeasuredEngine,
)
from services.worker.host_context import HostContext
from services.worker.takeover import from_elsewhere
from shared.errors import EngineFailed

log = logging.getLogger("oserve.worker")

FAREWELL_S = 2.0
"""For the own order to stop to arrive, after a leader that was stopped first has said farewell."""


class FollowerHost:
    def __init__(self, start: EngineStart, context: HostContext) -> None:
        assert context.factory.follow is not None, "the core has no engine part for this rank"
        self.replica_id, self.generation = start.spec.replica_id, start.generation
        self._start, self._follow = start, context.factory.follow
        self._feed, self._worker_id = context.feed, context.config.worker_id
        self._follower: Follower | None = None
        self._stopping = asyncio.Event()
        self._building = Building(lambda: go_on(self._stopping.is_set()))

    def expect(self, order: EngineExpect) -> None:
        if self._follower is not None:
            self._follower.expect(order.copies, order.peers, verify=order.verify)

    def stop(self) -> None:
        """EngineStopped follows."""
        self._stopping.set()
        if self._follower is not None:
            self._follower.stop()

    def measured(self) -> MeasuredEngine:
        """It has no load of its own: the leader tells the replica's."""
        return MeasuredEngine(
            replica_id=self.replica_id,
            generation=self.generation,
            load=EngineLoad(),
            fetched_bytes=from_elsewhere(dict(self._building.fetched), self._worker_id),
            cache_bytes=self._follower.cache_bytes if self._follower is not None else 0,
        )

    async def run(self) -> None:
        """From start to stop. Whatever it raises loses its replica, not the worker."""
        thread = EngineThread(f"rank-{self.replica_id}-{self.generation}")
        try:
            with suppress(StartGivenUp):
                await self._serve(thread)
        except AssertionError:
            raise
        except Exception as error:  # torch and drivers raise anything
            log.warning("rank.broken", exc_info=error, extra={"replica_id": self.replica_id})
            self._feed(
                EngineBroken(
                    replica_id=self.replica_id,
                    generation=self.generation,
                    detail=f"{type(error).__name__}: {error}",
                )
            )
        else:
            self._feed(EngineStopped(replica_id=self.replica_id, generation=self.generation))
        finally:
            thread.close()

    async def _serve(self, thread: EngineThread) -> None:
        follower = await thread.call(lambda: self._follow(self._start, self._building))
        try:
            if not self._stopping.is_set():
                self._begin(follower)
                await thread.call(follower.serve)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), FAREWELL_S)
            if not self._stopping.is_set():
                raise EngineFailed("its leader has closed the replica")
        finally:
            self._follower = None
            await thread.call(follower.close)

    def _begin(self, follower: Follower) -> None:
        self._follower = follower
        ready = EngineReady(
            replica_id=self.replica_id,
            generation=self.generation,
            bytes_by_source=dict(follower.fetched),
            took_s=follower.fetch_s,
            cache_bytes=follower.cache_bytes,
            cache_bytes_full=follower.cache_bytes_full,
        )
        self._feed(ready)
