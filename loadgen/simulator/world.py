"""A deterministic world: real cores, virtual time, and a network that one seed decides.

What happens is totally ordered by (time, sequence number). The world performs every effect of
shared/core.py as the runtime does in production, except that messages may be lost, late, repeated
and out of order, and that processes crash, stall and are cut off. Nothing in it depends on the
order of sets or on the hash of strings, so a seed replays bit for bit.

A world that hunts for faults checks every core after each of its steps and keeps a trace. One that
answers how long things take (``checked=False``) does neither: it is several times faster.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, assert_never

from loadgen.simulator.bucket import Bucket, reach
from loadgen.simulator.faults import CALM, Incident, Weather
from loadgen.simulator.port import WorldPort
from loadgen.simulator.process import Audience, Node, NodeSpec, Process, audience
from loadgen.simulator.trace import Trace
from shared.core import (
    Ask,
    Core,
    Effect,
    Load,
    Log,
    Publish,
    Query,
    Reply,
    SetTimer,
    Start,
    Started,
    Store,
)

NEXT_WORD_S = 0.05
"""So long after a partition whoever speaks now and then only is made to speak."""
Action = Callable[[], None]
_Due = tuple[float, int, Node | None, int, Any]
"""When, in which order, and an event for one process of a node (by its number), for all that run
there (0: a message), or an action of the world itself (no node)."""


class World:
    def __init__(
        self, seed: int, *, weather: Weather = CALM, trace_max: int = 2000, checked: bool = True
    ) -> None:
        self.now_s = 0.0
        self.checked = checked
        self.rng = random.Random(seed)
        self.weather = weather
        self.bucket = Bucket(keeps_history=checked)
        self.trace = Trace(trace_max)
        self.steps = 0
        self.lost: set[str] = set()  # nodes that never come back
        self.taps: list[Callable[[str, Publish], None]] = []  # see each message as it is sent
        self.watches: list[Action] = []  # run after each step
        self.halted = False  # set by whoever has seen enough
        self._heap: list[_Due] = []
        self._soon: deque[tuple[Node, int, Any]] = deque()  # what happens before anything else
        self._seq = 0
        self._trouble_until_s = 0.0  # until then some node is cut off or slow
        self._nodes: dict[str, Node] = {}
        self._audiences: dict[str, Audience] = {}

    def add(self, spec: NodeSpec) -> None:
        """Start a process that is never removed, only crashed and started again."""
        assert spec.name not in self._nodes, spec.name
        self._nodes[spec.name] = Node(spec)
        self._audiences.clear()
        self._start(spec.name)

    def plan(self, incidents: Iterable[Incident]) -> None:
        for incident in incidents:
            self.at(incident.at_s, lambda incident=incident: self._strike(incident))

    def at(self, at_s: float, action: Action) -> None:
        """Do ``action`` at that time, as the world's own doing."""
        self.push(at_s, None, 0, action)

    def run(self, until_s: float) -> None:  # noqa: C901  # the loop that everything runs in
        """Let everything happen that is due up to ``until_s``, which becomes the time."""
        heap, pop, soon = self._heap, heapq.heappop, self._soon
        while True:
            if soon:
                at_s = self.now_s
                node, number, event = soon.popleft()
            elif heap and heap[0][0] <= until_s and not self.halted:
                at_s, _, node, number, event = pop(heap)
                self.now_s = at_s
            else:
                break
            if node is None:
                event()
            elif number:
                process = node.processes.get(number)
                if process is not None:
                    self._step(at_s, node, process, event)
            elif len(node.processes) == 1:
                for process in node.processes.values():  # the rule, and worth no copy
                    self._step(at_s, node, process, event)
                    break
            else:
                for process in list(node.processes.values()):
                    self._step(at_s, node, process, event)
        if not self.halted:
            self.now_s = until_s

    def lose(self, name: str) -> None:
        """End what runs there, for good."""
        self.trace.note(self.now_s, name, "-- lost for good --")
        self._end(self._nodes[name])
        self.lost.add(name)

    def calm(self) -> None:
        """From now on nothing goes wrong, and whoever was down, cut off or still goes on."""
        self.weather = CALM
        for name, node in self._nodes.items():
            if name in self.lost:
                continue
            node.cut_until_s = node.slow_until_s = 0.0
            newest = node.newest
            if newest is None:
                self._start(name)
            else:
                newest.stalled_until_s = 0.0
                node.processes = {newest.number: newest}

    def restart(self, name: str) -> None:
        """End what runs there and start it anew, as an operator does."""
        self._end(self._nodes[name])
        self._start(name)

    def cores(self) -> Iterator[Core]:
        """Those of all processes that run."""
        yield from (p.core for node in self._nodes.values() for p in node.processes.values())

    def core(self, name: str) -> Core | None:
        """The core of the newest process; None while it is down."""
        newest = self._nodes[name].newest
        return None if newest is None else newest.core

    def schedule(
        self,
        delay_s: float,
        node: Node,
        number: int,
        event: Any,  # noqa: ANN401  # any core's event
    ) -> None:
        if delay_s > 0.0:
            self.push(self.now_s + delay_s, node, number, event)
        else:
            self._soon.append((node, number, event))

    def publish(self, sender: str, effect: Publish) -> None:
        for tap in self.taps:
            tap(sender, effect)
        subject, message = effect.subject, effect.message
        known = self._audiences.get(subject) or self._audience(subject)
        for node in known.listeners:
            self._deliver(sender, node, message)

    def ask(self, sender: str, effect: Ask) -> None:
        """Hand a question to one running member of each queue group that listens."""
        for members in self._audience(effect.subject).groups.values():
            up = [node for node in members if node.processes]
            if up:
                query = Query(effect.message, effect.reply_to)
                chosen = up[0] if len(up) == 1 else self.rng.choice(up)
                self._deliver(sender, chosen, query)

    def _audience(self, subject: str) -> Audience:
        """Who hears ``subject``; found out once, since matching is slow."""
        known = self._audiences.get(subject)
        if known is None:
            known = self._audiences[subject] = audience(subject, self._nodes)
        return known

    def _deliver(self, sender: str, receiver: Node, event: Any) -> None:  # noqa: ANN401
        weather, now_s = self.weather, self.now_s
        if weather.steady and now_s >= self._trouble_until_s:
            self._seq = seq = self._seq + 1
            heapq.heappush(self._heap, (now_s + weather.delay_s_min, seq, receiver, 0, event))
            return
        rng = self.rng
        source = self._nodes[sender]
        cut = now_s < source.cut_until_s or now_s < receiver.cut_until_s
        slow = max(source.slowness(now_s), receiver.slowness(now_s))
        copies = 2 if weather.duplicate and rng.random() < weather.duplicate else 1
        for _ in range(copies):
            lost = weather.loss and rng.random() < weather.loss
            if not lost and (not cut or source is receiver):
                self.push(now_s + slow * weather.delay_s(rng), receiver, 0, event)

    def _step(self, at_s: float, node: Node, process: Process, event: Any) -> None:  # noqa: ANN401
        if at_s < process.stalled_until_s:
            self.push(process.stalled_until_s, node, process.number, event)
            return
        self.steps += 1
        if not self.checked:
            if callable(event):
                event()
            else:
                self._perform(node, process, process.core.step(event, self.now_s))
            return
        self.trace.record(self.now_s, node.spec.name, event)
        if callable(event):
            event()
        else:
            self._perform(node, process, process.core.step(event, self.now_s))
        process.core.check()
        for watch in self.watches:
            watch()

    def _perform(  # noqa: C901  # one case per effect
        self, node: Node, process: Process, effects: Sequence[Effect]
    ) -> None:
        name = node.spec.name
        for effect in effects:
            match effect:
                case Publish():
                    self.publish(name, effect)
                case Reply(to=to, message=message):
                    self.publish(name, Publish(to, message))
                case Ask():
                    self.ask(name, effect)
                case SetTimer(at_s=at_s, event=event):
                    alarm = process.port.alarm
                    if alarm is None or not alarm(at_s, event):
                        self.push(at_s, node, process.number, event)
                case Store() | Load():
                    reach(self, node, process.number, effect)
                case Start(job=job, argument=argument):
                    process.jobs[job](argument)
                case Log(event=event, fields=fields, level=level):
                    if self.checked:
                        self.trace.note(self.now_s, name, f"({level}) {event} {fields}")
                case _:
                    assert_never(effect)

    def _strike(self, incident: Incident) -> None:
        name, until_s = incident.node, self.now_s + incident.for_s
        node = self._nodes[name]
        newest = node.newest
        self.trace.note(self.now_s, name, f"-- {incident.kind} for {incident.for_s:.2f} s --")
        match incident.kind:
            case "crash":
                self._end(node)
                self.at(until_s, lambda: self._settle(name))
            case "stall" if newest is not None:
                node.warn(self.now_s)
                newest.stalled_until_s = max(newest.stalled_until_s, until_s)
            case "twin" if newest is not None:
                node.warn(self.now_s)
                newest.stalled_until_s = self.now_s + incident.for_s / 2
                self._start(name)
                self.at(until_s, lambda: self._settle(name))
            case "partition":
                node.warn(self.now_s)
                # What it says until the end is lost, and what it says next shows that.
                for at_s in (math.nextafter(until_s, 0.0), until_s + NEXT_WORD_S):
                    self.at(at_s, lambda at_s=at_s: node.warn(at_s))
                node.cut_until_s = max(node.cut_until_s, until_s)
                self._trouble_until_s = max(self._trouble_until_s, until_s)
            case "slow":
                node.slow_until_s = max(node.slow_until_s, until_s)
                node.slow_factor = incident.factor
                self._trouble_until_s = max(self._trouble_until_s, until_s)
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
        port = WorldPort(self, node, number)
        core, jobs = node.spec.make(number, port)
        node.processes = {**node.processes, number: Process(core, jobs, number, port)}
        self.trace.note(self.now_s, name, f"-- started, number {number} --")
        self.push(self.now_s, node, number, Started())

    def _end(self, node: Node) -> None:
        """End what runs there. What it had sent before is on its way."""
        node.warn(self.now_s)
        node.processes = {}

    def push(self, at_s: float, node: Node | None, number: int, event: Any) -> None:  # noqa: ANN401
        self._seq = seq = self._seq + 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), seq, node, number, event))
