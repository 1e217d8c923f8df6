"""Leaves out a worker's measurements that would find nothing new.

In production each worker measures its engines ten times a second, and reports what has changed. A
measurement of engines to which nothing has happened since the last one has no effect, so that a
simulation need not make it: the timer for it sleeps until something happens, and then goes off at
the very moment at which it would have. One in ``keepalive_s`` is made in any case, for those who
take silence for death.
"""

from math import ceil

from loadgen.simulator.process import Port
from services.worker.events import ReplicaReportTick
from shared.messages.base import Message

TICK = ReplicaReportTick()


class Pulse:
    def __init__(self, port: Port, *, report_s: float, keepalive_s: float) -> None:
        self._port, self._report_s, self._keepalive_s = port, report_s, keepalive_s
        self._grid_s = 0.0  # a time at which the timer would go off
        self._quick = True  # something has happened since the last measurement
        self._asleep = False
        self._guarded = False  # a look at whether it has slept for too long is due
        self._measured_s = 0.0
        port.alarm = self.take

    def take(self, at_s: float, event: Message) -> bool:
        """Each measurement sets the timer for the next."""
        if type(event) is not ReplicaReportTick:
            return False
        now_s = self._port.now_s
        self._grid_s, self._measured_s = at_s, now_s
        if self._quick:
            self._quick = False
            self._port.feed(TICK, delay_s=at_s - now_s)
            return True
        self._asleep = True
        if not self._guarded:
            self._guarded = True
            self._port.later(self._keepalive_s, self._guard)
        return True

    def quicken(self) -> None:
        """Something has happened to an engine."""
        if not self._asleep:
            self._quick = True
            return
        self._asleep = False
        late_s = self._port.now_s - self._grid_s
        missed = ceil(late_s / self._report_s) if late_s > 0.0 else 0
        self._port.feed(TICK, delay_s=missed * self._report_s - late_s)

    def _guard(self) -> None:
        left_s = self._measured_s + self._keepalive_s - self._port.now_s
        if left_s > 0.0:
            self._port.later(left_s, self._guard)
            return
        self._guarded = False
        if self._asleep:
            self._asleep = False
            self._port.feed(TICK)
