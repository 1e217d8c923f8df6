"""Calls that an engine allows between two steps only, done by whoever steps it, in order."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from services.worker.engine.interface import Engine
from shared.errors import EngineFailed, PeerLost, Rejected

T = TypeVar("T")
Performer = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Call:
    what: Callable[[Engine], Any]
    done: "asyncio.Future[Any] | None"
    then: Callable[[Any], None] | None


class Between:
    """What is asked for is bounded by who asks: a task of the switch at a time, and a connection
    of a peer each."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._calls: deque[_Call] = deque()
        self._closed = False

    async def do(self, what: Callable[[Engine], T]) -> T:
        """Its result. Raises PeerLost and Rejected as it does, EngineFailed when the engine breaks
        or ends before. Not done at all if the caller is cancelled before its turn."""
        if self._closed:
            raise EngineFailed("the engine has ended")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.append(_Call(what, done, None))
        self._wake()
        return await done

    def post(self, what: Callable[[Engine], T], then: Callable[[T], None] | None = None) -> None:
        """Have it done whoever waits, then call ``then`` with its result. Whatever it raises breaks
        the engine. Nothing happens once the engine has ended."""
        if not self._closed:
            self._calls.append(_Call(what, None, then))
            self._wake()

    async def perform(self, engine: Engine, performer: Performer) -> bool:
        """Do all there is; whether there was any. Raises what breaks the engine."""
        any_done = False
        while self._calls:
            call = self._calls.popleft()
            if call.done is not None and call.done.done():
                continue  # its caller has gone
            any_done = True
            await _perform(call, engine, performer)
        return any_done

    def close(self) -> None:
        self._closed = True
        while self._calls:
            call = self._calls.popleft()
            if call.done is not None and not call.done.done():
                call.done.set_exception(EngineFailed("the engine has ended"))


async def _perform(call: _Call, engine: Engine, performer: Performer) -> None:
    try:
        result = await performer(lambda: call.what(engine))
    except (PeerLost, Rejected) as error:
        if call.done is None:
            raise
        if not call.done.done():
            call.done.set_exception(error)
    except BaseException as error:
        if call.done is not None and not call.done.done():
            call.done.set_exception(EngineFailed(f"{type(error).__name__}: {error}"))
        raise
    else:
        if call.done is not None and not call.done.done():
            call.done.set_result(result)
        if call.then is not None:
            call.then(result)
