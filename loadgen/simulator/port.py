"""What a simulated process reaches its world by."""

import math
from collections.abc import Callable
from typing import Any, Protocol

from loadgen.simulator.process import Alarm, Node
from shared.core import Publish
from shared.messages.base import Message


class Surroundings(Protocol):
    """Of the world, what a port needs."""

    now_s: float

    def schedule(self, delay_s: float, node: Node, number: int, event: Any) -> None: ...  # noqa: ANN401
    def publish(self, sender: str, effect: Publish) -> None: ...


class WorldPort:
    """See process.Port."""

    def __init__(self, world: Surroundings, node: Node, number: int) -> None:
        self._world, self._node, self._number = world, node, number
        self.before_trouble: Callable[[], None] | None = None
        self.alarm: Alarm | None = None

    @property
    def alive(self) -> bool:
        return self._number in self._node.processes

    @property
    def silence_s(self) -> float:
        process = self._node.processes.get(self._number)
        if process is None:
            return math.inf
        until_s = max(process.stalled_until_s, self._node.cut_until_s)
        return max(0.0, until_s - self._world.now_s)

    @property
    def now_s(self) -> float:
        return self._world.now_s

    def feed(self, event: Message, *, delay_s: float = 0.0) -> None:
        self._world.schedule(delay_s, self._node, self._number, event)

    def publish(self, effect: Publish) -> None:
        self._world.publish(self._node.spec.name, effect)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._world.schedule(delay_s, self._node, self._number, action)
