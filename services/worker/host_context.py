"""What all engines of one worker process share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.worker.config import WorkerConfig
from services.worker.engine.factory import EngineFactory
from services.worker.outbox import Outbox
from services.worker.peers.server import PeerServer
from shared.clock import Clock
from shared.messages.base import Message

Feed = Callable[[Message], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostContext:
    """``feed`` hands events to the core's runtime; ``tasks`` own the engines' loops; without
    ``peers`` nobody can take requests over from here."""

    config: WorkerConfig
    factory: EngineFactory
    outbox: Outbox
    clock: Clock
    feed: Feed
    tasks: asyncio.TaskGroup
    peers: PeerServer | None = None
