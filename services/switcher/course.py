"""What this switcher has seen of the switch under way: memory that a new one does without.

From it come what was lost on the way, the planned copies, and the figures of the report.
"""

import math
from collections.abc import Iterable

from services.switcher.events import TransferPlanned, TransferWanted
from services.switcher.machine import State, Switch
from services.switcher.view import Part, ReplicaEvent, WorkerView
from shared.messages.plans import SwitchReport
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaPrepared,
    ReplicaStarted,
    RequestsTaken,
)

DISK = "disk"
NOTES_MAX = 32
RECOVERED = "the switcher was started in the middle: what happened before is in no figure"


class Course:
    def __init__(self, switch: Switch, state: State, now_s: float) -> None:
        self._switch = switch
        self.planned: TransferPlanned | None = None
        self.asked: TransferWanted | None = None  # what the job was started with
        self._seen: dict[Part, int] = {}
        self._state = state
        self._entered_s = now_s
        self._phase_s: dict[str, float] = {}
        self._prepared: dict[Part, ReplicaPrepared] = {}
        self._taken: dict[Part, RequestsTaken] = {}
        self._started: dict[Part, ReplicaStarted] = {}
        self._handed_back: dict[Part, int] = {}
        self._failed: dict[Part, str] = {}
        self._notes: dict[str, None] = {}

    def see(self, parts: Iterable[Part], view: WorkerView) -> None:
        """Remember which of these ranks are there for this switch."""
        for part in parts:
            held = view.held(part)
            if held is not None and max(held.epoch, held.prepared) >= self._switch.epoch:
                self._seen.setdefault(part, view.turn)

    def lost(self, part: Part, view: WorkerView) -> bool:
        """Whether the rank was there for this switch, and its worker has let go of it since."""
        return part in self._seen and view.lost_after(part, self._seen[part])

    def failure(self, part: Part) -> str:
        """What its worker said that went wrong in this switch, though it may hold nothing of the
        replica; empty if nothing did."""
        return self._failed.get(part, "")

    def left_over(self, parts: Iterable[Part], view: WorkerView) -> bool:
        """Whether another switcher has had these ranks prepared before us."""
        return self._switch.recovered and any(
            (held := view.held(part)) and held.epoch >= self._switch.epoch for part in parts
        )

    def enter(self, state: State, now_s: float) -> None:
        self._close(now_s)
        self._state = state

    def on_event(self, event: ReplicaEvent) -> None:
        """Events are repeated: of each rank the one that says most counts."""
        if event.epoch != self._switch.epoch:
            return
        part = (event.worker_id, event.replica_id)
        match event:
            case ReplicaPrepared():
                known = self._prepared.get(part)
                if known is None or _bytes(known) <= _bytes(event):
                    self._prepared[part] = event
            case RequestsTaken():
                known = self._taken.get(part)
                if known is None or known.moved + known.replayed <= event.moved + event.replayed:
                    self._taken[part] = event
            case ReplicaStarted():
                known = self._started.get(part)
                if known is None or _requests(known) <= _requests(event):
                    self._started[part] = event
            case ReplicaFailed():
                self._failed.setdefault(part, event.detail)
            case ReplicaDrained():
                known = self._handed_back.get(part, 0)
                self._handed_back[part] = max(known, event.handed_back)
            case _:
                pass  # they say nothing of bytes or requests

    def note(self, text: str) -> None:
        """For the report's reader: what did not go as planned."""
        if len(self._notes) < NOTES_MAX:
            self._notes[text] = None

    def report(self, now_s: float) -> SwitchReport:
        self._close(now_s)
        links: dict[str, int] = {}
        in_place = 0
        cache = [(t, s, n) for e in self._taken.values() for t, s, n in _cache_bytes(e)]
        weights = [
            (worker_id, source, count)
            for (worker_id, _), event in sorted(self._prepared.items())
            for source, count in sorted(event.bytes_by_source.items())
        ]
        for target, source, count in (*weights, *cache):
            if source == target:
                in_place += count
            else:
                link = f"{source or DISK}>{target}"
                links[link] = links.get(link, 0) + count
        pauses = [pause for event in self._started.values() for pause in event.pauses]
        planned = self.planned or TransferPlanned(epoch=self._switch.epoch)
        taken = self._taken.values()
        why_replayed = [f"{event.replica_id}: {event.detail}" for event in taken if event.detail]
        recovered = (RECOVERED,) if self._switch.recovered else ()
        return SwitchReport(
            way=self._switch.way,
            bytes_by_link=dict(sorted(links.items())),
            bytes_bound=planned.bytes_bound + sum(event.bytes_needed for event in taken),
            bytes_in_place=in_place,
            cache_bytes=sum(count for target, source, count in cache if source != target),
            cache_ahead_bytes=sum(event.ahead_bytes for event in taken),
            phase_s=dict(self._phase_s),
            moved=sum(event.moved for event in taken),
            replayed=sum(e.replayed for e in taken) + sum(self._handed_back.values()),
            pause_p50_s=percentile(pauses, 0.5),
            pause_p99_s=percentile(pauses, 0.99),
            stages=max(1, len(planned.stages)),
            notes=(*planned.notes, *why_replayed, *self._notes, *recovered),
        )

    def _close(self, now_s: float) -> None:
        """Book the time since the last call on the state that we were in."""
        spent_s = self._phase_s.get(self._state, 0.0) + now_s - self._entered_s
        self._phase_s[self._state] = spent_s
        self._entered_s = now_s


def percentile(pauses: Iterable[tuple[float, int]], share: float) -> float:
    """The least time that at least ``share`` of the requests waited no longer than; each entry
    is (seconds, requests)."""
    ordered = sorted((seconds, count) for seconds, count in pauses if count > 0)
    wanted = math.ceil(share * sum(count for _, count in ordered))
    for seconds, count in ordered:
        wanted -= count
        if wanted <= 0:
            return seconds
    return 0.0


def _bytes(event: ReplicaPrepared) -> int:
    return sum(event.bytes_by_source.values())


def _requests(event: ReplicaStarted) -> int:
    return sum(count for _, count in event.pauses)


def _cache_bytes(event: RequestsTaken) -> Iterable[tuple[str, str, int]]:
    for target, sources in sorted(event.bytes_by_source.items()):
        for source, count in sorted(sources.items()):
            yield target, source, count
