"""What the simulated world knows of a process, and what a process may do in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shared.core import Core, Publish
from shared.messages.base import Message
from shared.subjects import Subject

Job = Callable[[Any], None]
"""Performs a Start effect; its outcome, if any, comes back through the process's Port."""


Alarm = Callable[[float, Message], bool]
"""Takes over a timer (when it is due, and its event); False leaves it to the world."""


class Port(Protocol):
    """What the adapters of one process may do. All of it ends with the process.
    ``before_trouble`` is called when the process is about to die, to stall, to be cut off or heard
    again: what it had sent by then and only the adapter knows of."""

    before_trouble: Callable[[], None] | None
    alarm: Alarm | None

    @property
    def alive(self) -> bool:
        """False once the process has ended."""
        ...

    @property
    def silence_s(self) -> float:
        """How long until others hear from the process: 0 now, infinite once it has ended."""
        ...

    @property
    def now_s(self) -> float: ...

    def feed(self, event: Message, *, delay_s: float = 0.0) -> None:
        """Hand an event to the core."""
        ...

    def publish(self, effect: Publish) -> None: ...

    def later(self, delay_s: float, action: Callable[[], None]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A process: how to start it (again), and what it listens to. ``make`` is given a number
    that grows with each start, and the port for its adapters; it returns the core and the jobs
    that perform its Start effects."""

    name: str
    make: Callable[[int, Port], tuple[Core, Mapping[str, Job]]]
    inputs: Sequence[Subject[Any]] = ()
    queries: Sequence[tuple[Subject[Any], str]] = ()


@dataclass(slots=True)
class Process:
    core: Core
    jobs: Mapping[str, Job]
    number: int
    port: Port
    stalled_until_s: float = 0.0


@dataclass(slots=True, eq=False)
class Node:
    """A place in the mesh, and the processes that run there: one, none, or two twins."""

    spec: NodeSpec
    starts: int = 0
    cut_until_s: float = 0.0
    slow_until_s: float = 0.0
    slow_factor: float = 1.0
    processes: dict[int, Process] = field(default_factory=dict[int, Process])

    @property
    def newest(self) -> Process | None:
        return self.processes[max(self.processes)] if self.processes else None

    def warn(self, now_s: float) -> None:
        """Trouble begins here, or ends. Who stands still already has nothing to say."""
        for process in self.processes.values():
            before_trouble = process.port.before_trouble
            if before_trouble is not None and now_s >= process.stalled_until_s:
                before_trouble()

    def slowness(self, now_s: float) -> float:
        """What a message's delay is multiplied by."""
        return self.slow_factor if now_s < self.slow_until_s else 1.0


def matches(subject: str, wildcard: str) -> bool:
    """Whether a subscription to ``wildcard`` hears ``subject``: ``*`` stands for one token, and
    ``>`` at the end for one or more."""
    tokens, patterns = subject.split("."), wildcard.split(".")
    for index, pattern in enumerate(patterns):
        if pattern == ">":
            return len(tokens) > index
        if index >= len(tokens) or pattern not in ("*", tokens[index]):
            return False
    return len(tokens) == len(patterns)


@dataclass(slots=True)
class Audience:
    """Who hears a subject: all ``listeners``, and one member of each queue group."""

    listeners: list[Node] = field(default_factory=list[Node])
    groups: dict[str, list[Node]] = field(default_factory=dict[str, list[Node]])


def audience(subject: str, nodes: Mapping[str, Node]) -> Audience:
    found = Audience()
    for node in nodes.values():
        if any(matches(subject, listened.wildcard) for listened in node.spec.inputs):
            found.listeners.append(node)
        for listened, group in node.spec.queries:
            if matches(subject, listened.wildcard):
                found.groups.setdefault(group, []).append(node)
    return found
