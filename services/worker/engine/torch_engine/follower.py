"""A rank that does what the leader of its replica says, until the leader closes the session."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.worker.engine.torch_engine.commands import STEP, parted
from services.worker.engine.torch_engine.rank_runner import RankRunner
from services.worker.engine.torch_engine.step_plan import PlanReader
from shared.errors import EngineFailed
from shared.placement.copies import Copy

CommandHandler = Callable[[bytes], None]
"""Obeys a command's body. Raises EngineFailed when the replica is lost."""


class CommandSource(Protocol):
    """The part of a FollowerSession that brings commands; None once the leader has closed it."""

    def recv(self) -> bytes | None: ...


class Obeys(Protocol):
    """A follower's part in something: what the leader commands, by tag."""

    @property
    def handlers(self) -> Mapping[int, CommandHandler]: ...


class TakesPart(Obeys, Protocol):
    """Its part in taking requests over."""

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerParts:
    """What a follower is put together from. ``stop`` ends the session, from any
    thread; ``close`` frees everything."""

    runner: RankRunner
    reader: PlanReader
    session: CommandSource
    fetched: dict[str, int]
    cache_bytes: Callable[[], int]
    stop: Callable[[], None]
    close: Callable[[], None]
    takeover: TakesPart | None = None
    growth: Obeys | None = None
    cache_bytes_full: int = 0
    fetch_s: float = 0.0


class TorchFollower:
    """See Follower."""

    def __init__(self, parts: FollowerParts) -> None:
        self._parts: FollowerParts | None = parts
        self._fetched, self.fetch_s = parts.fetched, parts.fetch_s
        self._cache_bytes = parts.cache_bytes()
        self._cache_bytes_full = max(parts.cache_bytes_full, self._cache_bytes)
        self._stopped = False

    @property
    def fetched(self) -> dict[str, int]:
        return self._fetched

    @property
    def cache_bytes(self) -> int:
        """Read by another thread than the one in ``serve``."""
        parts = self._parts
        return self._cache_bytes if parts is None else parts.cache_bytes()

    @property
    def cache_bytes_full(self) -> int:
        return self._cache_bytes_full

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        assert self._parts is not None, "the follower is closed"
        assert self._parts.takeover is not None, "a follower without peers takes nothing over"
        self._parts.takeover.expect(copies, peers, verify=verify)

    def serve(self) -> None:
        parts = self._parts
        assert parts is not None, "the follower is closed"
        handlers: dict[int, CommandHandler] = {STEP: lambda body: _step(parts, body)}
        for part in (parts.takeover, parts.growth):
            handlers |= {} if part is None else part.handlers
        try:
            while (payload := parts.session.recv()) is not None:
                tag, body = parted(payload)
                handlers[tag](body)
        except RuntimeError as error:  # torch raises it for lost devices and lack of memory
            raise EngineFailed(f"the model failed on a follower: {error}") from error
        except EngineFailed:
            if not self._stopped:  # else the session ended because we ended it
                raise

    def stop(self) -> None:
        self._stopped = True
        if self._parts is not None:
            self._parts.stop()

    def close(self) -> None:
        """Weights and cache go with the parts; whoever still held them would keep the memory."""
        self.stop()
        parts, self._parts = self._parts, None
        if parts is not None:
            if parts.takeover is not None:
                parts.takeover.close()
            parts.close()


def _step(parts: FollowerParts, body: bytes) -> None:
    parts.runner.run(parts.reader.decode(body))
