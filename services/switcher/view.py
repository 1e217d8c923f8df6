"""What the switcher believes of the workers, made of reports and events that may be stale.

A report says what a worker held when it was sent. An event that carries an epoch says what was
done after a command of that epoch was sent, so it is the stronger witness: a report that shows a
replica under an older epoch than an event has proved is stale for that replica.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from shared.hardware import GpuSpec
from shared.messages.replicas import (
    HostedReplica,
    ReplicaDrained,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPrepared,
    ReplicaStarted,
    ReplicaStopped,
    RequestsTaken,
    WorkerReport,
)
from shared.placement.sheets import ModelShape

Part = tuple[str, str]
"""One rank of one replica: (worker_id, replica_id)."""
FORGET_S = 600.0
"""Of silence, after which a worker's hosted replicas are forgotten. Sooner, one that was held still
would come back with a rank that seems to be younger than what was lost of its replica meanwhile."""
ReplicaEvent = (
    ReplicaStarted
    | ReplicaDrained
    | ReplicaStopped
    | ReplicaFailed
    | ReplicaPrepared
    | ReplicaPaused
    | RequestsTaken
)


class _Worker:
    """The newest knowledge of one worker process."""

    __slots__ = ("hosted", "report", "seen_s")

    def __init__(self, report: WorkerReport, seen_s: float) -> None:
        self.report, self.seen_s = report, seen_s
        self.hosted: dict[str, HostedReplica] = {}


class WorkerView:
    """Who is alive, and who holds what. A worker never heard of counts as alive until
    ``worker_timeout_s`` after the start, so that a switcher started anew does not take silence
    that it could not hear for absence."""

    def __init__(self, *, worker_timeout_s: float, started_s: float) -> None:
        self._timeout_s = worker_timeout_s
        self._started_s = self._listened_s = started_s
        self._workers: dict[str, _Worker] = {}
        self._stopped: dict[Part, int] = {}
        self._drained: dict[Part, int] = {}
        self._starting_s: dict[Part, float] = {}
        self._turn = 0  # counts what was heard: which of two things happened first
        self._held_since: dict[Part, int] = {}
        self._lost_at: dict[Part, int] = {}
        self._refused: dict[Part, tuple[int, str]] = {}
        self.failures: dict[Part, int] = {}
        self.epoch_max = 0  # highest epoch that any worker has spoken of

    def on_report(self, report: WorkerReport, now_s: float) -> bool:
        """Take in ``report``; True if it changed what we believe."""
        self._turn += 1
        worker_id = report.worker_id
        worker = self._workers.get(worker_id)
        new = worker is None or worker.report.incarnation != report.incarnation
        if worker is None or new:
            self._forget(worker_id)
            worker = self._workers[worker_id] = _Worker(report, now_s)
        worker.seen_s = now_s
        if not new and report.number and report.number <= worker.report.number:
            return False  # late, or a copy: a sign of life and nothing else
        hosted: dict[str, HostedReplica] = {}
        for replica in report.replicas:
            self.epoch_max = max(self.epoch_max, replica.epoch)
            known = worker.hosted.get(replica.replica_id)
            if replica.epoch < self._stopped.get((worker_id, replica.replica_id), 0):
                continue
            if known is not None and replica.epoch < known.epoch:
                replica = known  # noqa: PLW2901  # the report is older than what we know
            hosted[replica.replica_id] = replica
        self._time_starts(worker_id, hosted, now_s)
        for replica_id, known in worker.hosted.items():
            if replica_id not in hosted and known.phase == "failed":
                self._lose((worker_id, replica_id))
        for replica_id in hosted:
            self._held_since.setdefault((worker_id, replica_id), self._turn)
        changed = new or hosted != worker.hosted or report.leaving != worker.report.leaving
        worker.hosted, worker.report = hosted, report
        return changed

    def on_event(self, event: ReplicaEvent) -> None:
        self._turn += 1
        part = (event.worker_id, event.replica_id)
        self.epoch_max = max(self.epoch_max, event.epoch)
        match event:
            case ReplicaStarted():
                self._update(part, event.epoch, phase="serving", taken=0)
            case ReplicaDrained():
                self._drained[part] = max(event.epoch, self._drained.get(part, 0))
                self._update(part, event.epoch, phase="draining")
            case ReplicaFailed():
                self.failures[part] = self.failures.get(part, 0) + 1
                if not event.refused:
                    self._update(part, event.epoch, phase="failed", detail=event.detail)
                self._refused[part] = (event.epoch, event.detail)
            case ReplicaStopped():
                self._stopped[part] = max(event.epoch, self._stopped.get(part, 0))
                held = self.held(part)
                self._starting_s.pop(part, None)
                if held is not None and held.epoch <= event.epoch:
                    del self._workers[part[0]].hosted[part[1]]
                    self._lose(part)
            case ReplicaPaused():
                held = self.held(part)
                if held is not None and held.phase != "failed":  # told before it broke
                    self._update(part, event.epoch, phase="paused")
            case ReplicaPrepared() | RequestsTaken():
                self._get_ready(part, event)

    def _get_ready(self, part: Part, event: ReplicaPrepared | RequestsTaken) -> None:
        """Neither changes the epoch of a replica that serves."""
        held = self.held(part)
        if held is None or held.prepared > event.epoch:
            return
        if isinstance(event, RequestsTaken):
            self._note(part, taken=event.epoch)
        elif held.prepared < event.epoch:
            phase = "prepared" if held.phase == "preparing" else held.phase
            self._note(part, phase=phase, prepared=event.epoch)

    def prune(self, *, epoch: int, now_s: float) -> None:
        """Forget what no longer matters once ``epoch`` is in force, to stay bounded."""
        self._stopped = {p: e for p, e in self._stopped.items() if e >= epoch}
        self._drained = {p: e for p, e in self._drained.items() if e >= epoch}
        self.failures.clear()
        self._refused.clear()
        self._starting_s = {p: s for p, s in self._starting_s.items() if p[0] in self._workers}
        self._workers = {w: v for w, v in self._workers.items() if now_s - v.seen_s <= FORGET_S}
        held = {(w, r) for w, worker in self._workers.items() for r in worker.hosted}
        ids = {replica_id for _, replica_id in held}
        self._held_since = {p: t for p, t in self._held_since.items() if p in held}
        self._lost_at = {p: t for p, t in self._lost_at.items() if p[1] in ids}

    def listen(self, now_s: float) -> None:
        """At each step. Timers leave no long gap between two: it is this process that stood still
        then. What workers said meanwhile is to come, and that nobody was heard makes none absent.
        """
        gap_s, self._listened_s = now_s - self._listened_s, now_s
        if gap_s > self._timeout_s / 2:
            self._started_s += gap_s
            for worker in self._workers.values():
                worker.seen_s += gap_s

    def gone(self, worker_id: str, now_s: float) -> bool:
        worker = self._workers.get(worker_id)
        seen_s = self._started_s if worker is None else worker.seen_s
        return now_s - seen_s > self._timeout_s

    def known(self) -> Iterator[str]:
        """Workers that have reported, sorted."""
        return iter(sorted(self._workers))

    def reported(self, worker_id: str) -> bool:
        return worker_id in self._workers

    def leaving(self, worker_id: str) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.report.leaving

    def incarnation(self, worker_id: str) -> str:
        """Empty for a worker never heard of; so are the next ones."""
        worker = self._workers.get(worker_id)
        return worker.report.incarnation if worker else ""

    def node(self, worker_id: str) -> str:
        worker = self._workers.get(worker_id)
        return worker.report.node_id if worker else ""

    def gpu(self, worker_id: str) -> GpuSpec:
        worker = self._workers.get(worker_id)
        return worker.report.gpu if worker else GpuSpec(gpu_id=worker_id)

    def peers(self, worker_ids: Iterable[str]) -> dict[str, str]:
        """Where these workers are reached by others, as far as they have said so."""
        found = {
            w: self._workers[w].report.peer for w in sorted(set(worker_ids) & set(self.known()))
        }
        return {worker_id: peer for worker_id, peer in found.items() if peer}

    def shape(self, worker_id: str, model_id: str) -> ModelShape | None:
        """Of the model, if this worker can move its weights."""
        worker = self._workers.get(worker_id)
        shapes = worker.report.shapes if worker else ()
        return next((shape for shape in shapes if shape.model_id == model_id), None)

    def hosted(self, worker_id: str) -> dict[str, HostedReplica]:
        worker = self._workers.get(worker_id)
        return {} if worker is None else worker.hosted

    def in_report(self, part: Part) -> HostedReplica | None:
        """As the worker's newest report itself shows it, whatever events have told since."""
        worker = self._workers.get(part[0])
        replicas = worker.report.replicas if worker is not None else ()
        return next((held for held in replicas if held.replica_id == part[1]), None)

    def held(self, part: Part) -> HostedReplica | None:
        return self.hosted(part[0]).get(part[1])

    def stopped(self, part: Part, *, epoch: int) -> bool:
        """Whether the worker said so in answer to a command of ``epoch`` or later."""
        return self._stopped.get(part, -1) >= epoch

    def drained(self, part: Part, *, epoch: int) -> bool:
        return self._drained.get(part, -1) >= epoch

    def refused(self, part: Part, *, epoch: int) -> str:
        """Why the worker never began what a command of ``epoch`` or later asked; "" if it did.
        It holds nothing of it, so its reports do not say it."""
        at, detail = self._refused.get(part, (-1, ""))
        return detail if at >= epoch and self.held(part) is None else ""

    def starting_for_s(self, part: Part, now_s: float) -> float:
        """How long the worker has said that it starts or prepares the replica; 0 if it does not."""
        return now_s - self._starting_s.get(part, now_s)

    @property
    def turn(self) -> int:
        """How much has been heard so far."""
        return self._turn

    def lost_after(self, part: Part, turn: int) -> bool:
        """Whether the worker has let go of it, or restarted while it held it, since then."""
        return self._lost_at.get(part, -1) > turn

    def lost_since(self, part: Part, other: Part) -> bool:
        """Whether ``part``, not held now, was let go or lost after ``other`` came to be held."""
        since = self._held_since.get(other)
        return since is not None and self._lost_at.get(part, -1) > since

    def _time_starts(self, worker_id: str, hosted: dict[str, HostedReplica], now_s: float) -> None:
        coming = {
            (worker_id, replica_id)
            for replica_id, held in hosted.items()
            if held.phase in {"starting", "preparing"}
        }
        for part in [p for p in self._starting_s if p[0] == worker_id and p not in coming]:
            del self._starting_s[part]
        for part in sorted(coming):
            self._starting_s.setdefault(part, now_s)

    def _forget(self, worker_id: str) -> None:
        """A new incarnation has none of what the former one held, and nothing refused."""
        for replica_id in self.hosted(worker_id):
            self._lose((worker_id, replica_id))
        for memory in (self._stopped, self._drained, self._starting_s, self._refused):
            for part in [p for p in memory if p[0] == worker_id]:
                del memory[part]

    def _lose(self, part: Part) -> None:
        self._held_since.pop(part, None)
        self._lost_at[part] = self._turn

    def _update(self, part: Part, epoch: int, **changes: Any) -> None:  # noqa: ANN401  # any field
        held = self.held(part)
        if held is not None and held.epoch <= epoch:
            self._note(part, epoch=epoch, **{"detail": "", **changes})

    def _note(self, part: Part, **changes: Any) -> None:  # noqa: ANN401  # any field
        hosted = self.hosted(part[0])
        hosted[part[1]] = msgspec.structs.replace(hosted[part[1]], **changes)
