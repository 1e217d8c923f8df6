"""The state bucket in memory, with the compare-and-set of a JetStream KV bucket."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from loadgen.simulator.faults import Weather
from loadgen.simulator.process import Node
from shared.core import Load, Loaded, Store, StoreConflict, Stored
from shared.messages.base import Message


@dataclass(frozen=True, slots=True)
class Write:
    """One write that took place: what a history of the bucket is made of."""

    key: str
    writer: str
    message: Message
    revision: int


class Bucket:
    def __init__(self, *, keeps_history: bool = True) -> None:
        self.history: list[Write] = []
        self.keeps_history = keeps_history
        self._revision = 0
        self.checks_revision = True  # a test turns it off to prove that somebody would notice
        self._newest: dict[str, Write] = {}

    def load(self, key: str) -> tuple[Message | None, int]:
        newest = self._newest.get(key)
        return (None, 0) if newest is None else (newest.message, newest.revision)

    def store(self, writer: str, key: str, message: Message, revision: int) -> int | None:
        """The new revision; None if the key's is no longer ``revision``. A repeat of what the
        key holds counts as that write, as it does in the runtime."""
        value, current = self.load(key)
        if revision != current and self.checks_revision:
            return current if value == message else None
        self._revision += 1
        write = Write(key, writer, message, self._revision)
        if self.keeps_history:
            self.history.append(write)
        self._newest[key] = write
        return write.revision


class Reaching(Protocol):
    """Of the world: what takes a message to the bucket and back."""

    now_s: float
    rng: random.Random
    weather: Weather
    bucket: Bucket

    def at(self, at_s: float, action: Callable[[], None]) -> None: ...
    def push(self, at_s: float, node: Node | None, number: int, event: Any) -> None: ...  # noqa: ANN401


def reach(world: Reaching, node: Node, number: int, effect: Store | Load) -> None:
    """Perform ``effect`` of process ``number``; its outcome comes as an event."""

    def way_s() -> float:
        """The runtime retries, so that a write or an answer may be late but is never lost."""
        return max(world.now_s, node.cut_until_s) + world.weather.delay_s(world.rng)

    def write(store: Store) -> Message:
        revision = world.bucket.store(node.spec.name, store.key, store.message, store.revision)
        chance = world.weather.conflict
        spurious = bool(chance) and world.rng.random() < chance
        if revision is None or spurious:
            return StoreConflict(key=store.key)
        return Stored(key=store.key, revision=revision)

    def arrive() -> None:
        """A write takes place even if its process dies meanwhile."""
        if isinstance(effect, Store):
            outcome = write(effect)
        else:
            message, revision = world.bucket.load(effect.key)
            outcome = Loaded(key=effect.key, message=message, revision=revision)
        world.push(way_s(), node, number, outcome)

    world.at(way_s(), arrive)
