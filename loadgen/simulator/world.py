"""A deterministic world: real cores, virtual time, and a network that one seed decides.

What happens is totally ordered by (time, sequence number). The world performs every effect of
shared/core.py as the runtime does in production, except that messages may be lost, late, repeated
and out of order, and that processes crash, stall and are cut off. Nothing in it depends on the
order of sets or on the hash of strings, so a seed replays bit for bit.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, assert_never

from loadgen.simulator.bucket import Bucket
from loadgen.simulator.faults import CALM, Incident, Weather
from loadgen.simulator.process import Audience, Node, NodeSpec, Process, audience
from loadgen.simulator.trace import Trace
from shared.core import (
    Ask,
    Core,
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    Query,
    Reply,
    SetTimer,
    Start,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.messages.base import Message

Action = Callable[[], None]


class _Due(NamedTuple):
    """Something that will happen: an event for process ``number`` of ``node``, for all that run
    there (0: a message), or an action of the world itself (no node)."""

    at_s: float
    seq: int
    node: str
    number: int
    event: Any


class _Port:
    """See process.Port."""

    def __init__(self, world: "World", node: str, number: int) -> None:
        self._world, self._node, self._number = world, node, number

    @property
    def now_s(self) -> float:
        return self._world.now_s

    def feed(self, event: Message, *, delay_s: float = 0.0) -> None:
        self._world.schedule(delay_s, self._node, self._number, event)

    def publish(self, effect: Publish) -> None:
        self._world.publish(self._node, effect)

    def later(self, delay_s: float, action: Action) -> None:
        self._world.schedule(delay_s, self._node, self._number, action)


class World:
    def __init__(self, seed: int, *, weather: Weather = CALM, trace_max: int = 2000) -> None:
        self.now_s = 0.0
        self.rng = random.Random(seed)
        self.weather = weather
        self.bucket = Bucket()
        self.trace = Trace(trace_max)
        self.steps = 0
        self.lost: set[str] = set()  # nodes that never come back
        self.taps: list[Callable[[str, Publish], None]] = []  # see each message as it is sent
        self.watches: list[Action] = []  # run after each step
        self._heap: list[_Due] = []
        self._seq = 0
        self._nodes: dict[str, Node] = {}
        self._audiences: dict[str, Audience] = {}

    def add(self, spec: NodeSpec) -> None:
        """Start a process that is never removed, only crashed and started again."""
        assert spec.name not in self._nodes, spec.name
        self._nodes[spec.name] = Node(spec)
        self._audiences.clear()
        self._start(spec.name)

    def plan(self, incidents: Sequence[Incident]) -> None:
        for incident in incidents:
            self.at(incident.at_s, lambda incident=incident: self._strike(incident))

    def at(self, at_s: float, action: Action) -> None:
        """Do ``action`` at that time, as the world's own doing."""
        self._push(at_s, "", 0, action)

    def run(self, until_s: float) -> None:
        """Let everything happen that is due up to ``until_s``, which becomes the time."""
        while self._heap and self._heap[0].at_s <= until_s:
            due = heapq.heappop(self._heap)
            self.now_s = max(self.now_s, due.at_s)
            self._happen(due)
        self.now_s = until_s

    def lose(self, name: str) -> None:
        """End what runs there, for good."""
        self.trace.note(self.now_s, name, "-- lost for good --")
        self._nodes[name].processes = {}
        self.lost.add(name)

    def calm(self) -> None:
        """From now on nothing goes wrong, and whoever was down, cut off or still goes on."""
        self.weather = CALM
        for name, node in self._nodes.items():
            if name in self.lost:
                continue
            node.cut_until_s = 0.0
            newest = node.newest
            if newest is None:
                self._start(name)
            else:
                newest.stalled_until_s = 0.0
                node.processes = {newest.number: newest}

    def restart(self, name: str) -> None:
        """End what runs there and start it anew, as an operator does."""
        self._nodes[name].processes = {}
        self._start(name)

    def core(self, name: str) -> Core | None:
        """The core of the newest process; None while it is down."""
        newest = self._nodes[name].newest
        return None if newest is None else newest.core

    def schedule(
        self,
        delay_s: float,
        node: str,
        number: int,
        event: Any,  # noqa: ANN401  # any core's event
    ) -> None:
        self._push(self.now_s + delay_s, node, number, event)

    def publish(self, sender: str, effect: Publish) -> None:
        for tap in self.taps:
            tap(sender, effect)
        for name in self._audience(effect.subject).listeners:
            self._deliver(sender, name, effect.message)

    def ask(self, sender: str, effect: Ask) -> None:
        """Hand a question to one running member of each queue group that listens."""
        for members in self._audience(effect.subject).groups.values():
            up = [name for name in members if self._nodes[name].processes]
            if up:
                query = Query(effect.message, effect.reply_to)
                self._deliver(sender, self.rng.choice(up), query)

    def _audience(self, subject: str) -> Audience:
        """Who hears ``subject``; found out once, since matching is slow."""
        known = self._audiences.get(subject)
        if known is None:
            known = self._audiences[subject] = audience(subject, self._nodes)
        return known

    def _deliver(self, sender: str, receiver: str, event: Any) -> None:  # noqa: ANN401
        weather, rng = self.weather, self.rng
        cut = self._cut(sender) or self._cut(receiver)
        copies = 2 if weather.duplicate and rng.random() < weather.duplicate else 1
        for _ in range(copies):
            lost = weather.loss and rng.random() < weather.loss
            if not lost and (not cut or sender == receiver):
                self._push(self.now_s + weather.delay_s(rng), receiver, 0, event)

    def _happen(self, due: _Due) -> None:
        if not due.node:
            due.event()
            return
        processes = self._nodes[due.node].processes
        if due.number:
            process = processes.get(due.number)
            if process is not None:
                self._step(due, process)
            return
        for process in list(processes.values()):
            self._step(due, process)

    def _step(self, due: _Due, process: Process) -> None:
        if due.at_s < process.stalled_until_s:
            self._push(process.stalled_until_s, due.node, process.number, due.event)
            return
        self.steps += 1
        event = due.event
        self.trace.record(self.now_s, due.node, event)
        if callable(event):
            event()
        else:
            self._perform(due.node, process, process.core.step(event, self.now_s))
            process.core.check()
        for watch in self.watches:
            watch()

    def _perform(self, name: str, process: Process, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Publish():
                    self.publish(name, effect)
                case Reply(to=to, message=message):
                    self.publish(name, Publish(to, message))
                case Ask():
                    self.ask(name, effect)
                case SetTimer(at_s=at_s, event=event):
                    self._push(max(at_s, self.now_s), name, process.number, event)
                case Store():
                    self._store(name, process.number, effect)
                case Load():
                    self._load(name, process.number, effect)
                case Start(job=job, argument=argument):
                    process.jobs[job](argument)
                case Log(event=event, fields=fields, level=level):
                    self.trace.note(self.now_s, name, f"({level}) {event} {fields}")
                case _:
                    assert_never(effect)

    def _store(self, name: str, number: int, effect: Store) -> None:
        def write() -> None:
            revision = self.bucket.store(name, effect.key, effect.message, effect.revision)
            chance = self.weather.conflict
            spurious = bool(chance) and self.rng.random() < chance
            outcome: Message = StoreConflict(key=effect.key)
            if revision is not None and not spurious:
                outcome = Stored(key=effect.key, revision=revision)
            self._push(self._reached_s(name), name, number, outcome)

        # The write reaches the bucket even if its process dies meanwhile.
        self.at(self._reached_s(name), write)

    def _load(self, name: str, number: int, effect: Load) -> None:
        def read() -> None:
            message, revision = self.bucket.load(effect.key)
            outcome = Loaded(key=effect.key, message=message, revision=revision)
            self._push(self._reached_s(name), name, number, outcome)

        self.at(self._reached_s(name), read)

    def _reached_s(self, name: str) -> float:
        """When the bucket and ``name`` reach each other: the runtime retries, so that it may be
        late but is never lost."""
        return max(self.now_s, self._nodes[name].cut_until_s) + self.weather.delay_s(self.rng)

    def _strike(self, incident: Incident) -> None:
        name, until_s = incident.node, self.now_s + incident.for_s
        node = self._nodes[name]
        newest = node.newest
        self.trace.note(self.now_s, name, f"-- {incident.kind} for {incident.for_s:.2f} s --")
        match incident.kind:
            case "crash":
                node.processes = {}
                self.at(until_s, lambda: self._settle(name))
            case "stall" if newest is not None:
                newest.stalled_until_s = max(newest.stalled_until_s, until_s)
            case "twin" if newest is not None:
                newest.stalled_until_s = self.now_s + incident.for_s / 2
                self._start(name)
                self.at(until_s, lambda: self._settle(name))
            case "partition":
                node.cut_until_s = max(node.cut_until_s, until_s)
            case _:
                pass  # nobody is there to stall

    def _settle(self, name: str) -> None:
        """The supervisor looks: exactly one process should run."""
        node = self._nodes[name]
        if node.newest is not None:
            node.processes = {node.newest.number: node.newest}
        elif name not in self.lost:
            self._start(name)

    def _start(self, name: str) -> None:
        node = self._nodes[name]
        node.starts += 1
        number = node.starts
        core, jobs = node.spec.make(number, _Port(self, name, number))
        node.processes = {**node.processes, number: Process(core, jobs, number)}
        self.trace.note(self.now_s, name, f"-- started, number {number} --")
        self._push(self.now_s, name, number, Started())

    def _cut(self, name: str) -> bool:
        return self.now_s < self._nodes[name].cut_until_s

    def _push(self, at_s: float, node: str, number: int, event: Any) -> None:  # noqa: ANN401
        self._seq += 1
        heapq.heappush(self._heap, _Due(at_s, self._seq, node, number, event))
