"""The side of a switch that gives: an engine stands still, and says what it has."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.worker.attempts import Attempt
from services.worker.between import Between
from services.worker.engine.interface import Engine, LiveState
from services.worker.peers.link import PeerLink
from services.worker.peers.server import PeerServer
from services.worker.states import send_states, topic_of, wanted_of
from shared.clock import Clock
from shared.errors import EngineFailed, PeerLost
from shared.messages.replicas import Shares
from shared.messages.requests import RequestStates

STATES_S_MAX = 2.0  # for a question to wait for the end of a step


@dataclass(frozen=True, slots=True)
class _Snapshot:
    head: RequestStates
    states: list[tuple[Attempt, LiveState]]  # oldest first


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

    def offer(self, peers: PeerServer) -> None:
        """Answer those who take requests over, on their threads: each gets its own, and the event
        loop only what it alone knows."""
        loop = asyncio.get_running_loop()

        def answer(link: PeerLink, hello: bytes) -> None:
            wanted = wanted_of(hello)
            asked = asyncio.run_coroutine_threadsafe(self._seen(), loop)
            try:
                seen = asked.result(STATES_S_MAX)
            except TimeoutError:
                words = f"a step of {self._replica_id} takes longer than {STATES_S_MAX} s"
                raise PeerLost(words) from None
            except EngineFailed as error:
                raise PeerLost(f"{self._replica_id} has ended: {error}") from error
            finally:
                asked.cancel()
            send = seen.head.paused or not wanted.whole  # what still runs is asked for again
            states = (
                attempt.leaves_as(state, whole=wanted.whole)
                for attempt, state in seen.states
                if send and attempt.target(wanted.rows) == wanted.taker
            )
            send_states(link, seen.head, states)

        peers.offer(topic_of(self._replica_id), answer)
        self._withdraw = lambda: peers.withdraw(topic_of(self._replica_id), answer)

    def close(self) -> None:
        if self._withdraw is not None:
            self._withdraw()

    async def _seen(self) -> _Snapshot:
        """What the engine has between two steps."""
        head, states = await self._between.do(self._snapshot)
        attempts = ((self._live.get(state.request.key), state) for state in states)
        return _Snapshot(head, [(attempt, state) for attempt, state in attempts if attempt])

    def _snapshot(self, engine: Engine) -> tuple[RequestStates, list[LiveState]]:
        """In the engine's thread; its host waits meanwhile, so that it cannot come to stand."""
        since_s = self._paused_since_s
        head = RequestStates(
            replica_id=self._replica_id,
            block_tokens=engine.block_tokens,
            paused=since_s is not None,
            paused_for_s=0.0 if since_s is None else self._clock.now_s() - since_s,
        )
        return head, engine.states()
