"""The side of a switch that gives: an engine stands still, and says what it has."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.worker.attempts import Attempt
from services.worker.between import Between
from services.worker.engine.interface import Engine, LiveState
from services.worker.peers.link import PeerLink
from services.worker.peers.server import PeerServer
from shared.clock import Clock
from shared.messages.base import encode
from shared.messages.replicas import Shares
from shared.messages.requests import RequestStates

STATES_S_MAX = 2.0  # for a question to wait for the end of a step


def topic_of(replica_id: str) -> str:
    """Where a replica's leader is asked for its requests."""
    return f"requests/{replica_id}"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    states: list[LiveState]
    block_tokens: int
    paused: bool
    paused_for_s: float


class Handover:
    """``live`` are the host's attempts by their engine's keys."""

    def __init__(
        self, replica_id: str, between: Between, live: Mapping[str, Attempt], clock: Clock
    ) -> None:
        self._replica_id, self._between = replica_id, between
        self._live, self._clock = live, clock
        self._shares: Shares | None = None
        self._paused_since_s: float | None = None
        self._withdraw: Callable[[], None] | None = None

    @property
    def pausing(self) -> bool:
        """To stand still at the next step boundary."""
        return self._shares is not None and self._paused_since_s is None

    @property
    def paused(self) -> bool:
        return self._paused_since_s is not None

    def pause(self, shares: Shares) -> None:
        if self._shares is None:
            self._shares = shares

    def resume(self) -> None:
        self._shares = self._paused_since_s = None

    def stand_still(self, states: list[LiveState]) -> dict[str, str] | None:
        """At a step boundary: request_id -> the leader that takes it over. None if it was resumed
        just now."""
        if self._shares is None:
            return None
        self._paused_since_s = self._clock.now_s()
        moving: dict[str, str] = {}
        for state in states:
            attempt = self._live.get(state.request.key)
            if attempt is not None:
                target = attempt.target(self._shares.rows)
                leader = self._shares.leaders.get(target, "")
                if leader:
                    moving[attempt.request_id] = leader
        return moving

    async def states(self) -> RequestStates:
        """What the engine has between two steps, oldest first."""
        seen = await self._between.do(self._snapshot)
        states = tuple(
            self._live[state.request.key].leaves_as(state)
            for state in seen.states
            if state.request.key in self._live
        )
        return RequestStates(
            replica_id=self._replica_id,
            states=states,
            block_tokens=seen.block_tokens,
            paused=seen.paused,
            paused_for_s=seen.paused_for_s,
        )

    def offer(self, peers: PeerServer) -> None:
        """Answer those who take requests over, on their threads."""
        loop = asyncio.get_running_loop()

        def answer(link: PeerLink, hello: bytes) -> None:
            del hello  # it asks for nothing in particular
            asked = asyncio.run_coroutine_threadsafe(self.states(), loop)
            try:
                states = asked.result(STATES_S_MAX)
            finally:
                asked.cancel()
            link.send(encode(states))

        peers.offer(topic_of(self._replica_id), answer)
        self._withdraw = lambda: peers.withdraw(topic_of(self._replica_id), answer)

    def close(self) -> None:
        if self._withdraw is not None:
            self._withdraw()

    def _snapshot(self, engine: Engine) -> _Snapshot:
        """In the engine's thread; its host waits meanwhile, so that it cannot come to stand."""
        since_s = self._paused_since_s
        for_s = 0.0 if since_s is None else self._clock.now_s() - since_s
        return _Snapshot(engine.states(), engine.block_tokens, since_s is not None, for_s)
