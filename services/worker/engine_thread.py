"""One thread that runs one engine's slow calls, in order."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from shared.errors import EngineFailed

T = TypeVar("T")


class StartGivenUp(EngineFailed):
    """The replica was stopped before its engine was ready."""


def go_on(stopping: bool) -> None:
    """What an engine under construction calls now and then."""
    if stopping:
        raise StartGivenUp


class EngineThread:
    """Not a ThreadPoolExecutor: the interpreter waits for those at exit, and a device that hangs
    must not keep a worker from ending. Calls before the last has returned are a bug."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` there; its result or exception comes back here."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  # handed to the caller, all of them
                _tell(loop, done, lambda raised=error: done.set_exception(raised))
            else:
                _tell(loop, done, lambda: done.set_result(result))

        self._calls.put(run)
        return await done

    def close(self) -> None:
        """End the thread after the call in progress, without waiting for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _tell(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], settle: Callable[[], None]
) -> None:
    """Settle the future on its loop, unless either is gone by now."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: None if done.done() else settle())
