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


class Pulse:
    def __init__(self, port: Port, *, report_s: float, keepalive_s: float) -> None:
        self._port, self._report_s, self._keepalive_s = port, report_s, keepalive_s
        self._grid_s = 0.0  # a time at which the timer would go off
        self._quick = True  # something has happened since the last measurement
        self._asleep = False
        self._number = 0
        port.alarm = self.take

    def take(self, at_s: float, event: Message) -> bool:
        if type(event) is not ReplicaReportTick:
            return False
        self._grid_s = at_s
        now_s = self._port.now_s
        if self._quick:
            self._set(at_s - now_s, event)
        else:
            self._asleep = True
            self._set(max(at_s - now_s, self._keepalive_s), event)
        return True

    def quicken(self) -> None:
        """Something has happened to an engine."""
        self._quick = True
        if self._asleep:
            self._asleep = False
            late_s = self._port.now_s - self._grid_s
            missed = ceil(late_s / self._report_s) if late_s > 0.0 else 0
            self._set(missed * self._report_s - late_s, ReplicaReportTick())

    def _set(self, delay_s: float, event: Message) -> None:
        self._number = number = self._number + 1

        def go_off() -> None:
            if self._number == number:
                self._asleep = self._quick = False
                self._port.feed(event)

        self._port.later(max(0.0, delay_s), go_off)
