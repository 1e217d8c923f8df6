"""A worker's core whose engines are behind with what they say.

In production every token leaves with its step. Simulated engines send a request's tokens when it
ends, so that before anything that ends attempts otherwise they are made to say what they have.
"""

from loadgen.simulator.engines import Engines
from services.worker.core import WorkerCore, WorkerEvent
from services.worker.events import DrainDeadline
from shared.core import Draining, Effect
from shared.messages.replicas import StopReplica
from shared.messages.requests import AbortRequest

ENDING = (StopReplica, DrainDeadline, Draining, AbortRequest)


class Streaming:
    def __init__(self, core: WorkerCore, engines: Engines) -> None:
        self.core, self._engines = core, engines

    def step(self, event: WorkerEvent, now_s: float) -> list[Effect]:
        if isinstance(event, ENDING):
            self._engines.flush()
        return self.core.step(event, now_s)

    def check(self) -> None:
        self.core.check()
        self._engines.check()
