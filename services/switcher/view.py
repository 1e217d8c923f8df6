"""What the switcher believes of the workers, made of reports and events that may be stale.

A report says what a worker held when it was sent. An event that carries an epoch says what was
done after a command of that epoch was sent, so it is the stronger witness: a report that shows a
replica under an older epoch than an event has proved is stale for that replica.
"""

from collections.abc import Iterator

import msgspec

from shared.messages.replicas import (
    HostedReplica,
    ReplicaDrained,
    ReplicaFailed,
    ReplicaPhase,
    ReplicaStarted,
    ReplicaStopped,
    WorkerReport,
)

Part = tuple[str, str]
"""One rank of one replica: (worker_id, replica_id)."""


class _Worker:
    """The newest knowledge of one worker process."""

    __slots__ = ("hosted", "incarnation", "leaving", "seen_s")

    def __init__(self, incarnation: str, seen_s: float) -> None:
        self.incarnation, self.seen_s = incarnation, seen_s
        self.leaving = False
        self.hosted: dict[str, HostedReplica] = {}


class WorkerView:
    """Who is alive, and who holds what. A worker never heard of counts as alive until
    ``worker_timeout_s`` after the start, so that a switcher started anew does not take silence
    that it could not hear for absence."""

    def __init__(self, *, worker_timeout_s: float, started_s: float) -> None:
        self._timeout_s = worker_timeout_s
        self._started_s = started_s
        self._workers: dict[str, _Worker] = {}
        self._stopped: dict[Part, int] = {}
        self._drained: dict[Part, int] = {}
        self._starting_s: dict[Part, float] = {}
        self.failures: dict[Part, int] = {}
        self.epoch_max = 0  # highest epoch that any worker has spoken of

    def on_report(self, report: WorkerReport, now_s: float) -> bool:
        """Take in ``report``; True if it changed what we believe."""
        worker = self._workers.get(report.worker_id)
        new = worker is None or worker.incarnation != report.incarnation
        if worker is None or new:
            worker = self._workers[report.worker_id] = _Worker(report.incarnation, now_s)
            self._forget(report.worker_id)
        worker.seen_s = now_s
        hosted: dict[str, HostedReplica] = {}
        for replica in report.replicas:
            self.epoch_max = max(self.epoch_max, replica.epoch)
            known = worker.hosted.get(replica.replica_id)
            if replica.epoch < self._stopped.get((report.worker_id, replica.replica_id), 0):
                continue
            if known is not None and replica.epoch < known.epoch:
                replica = known  # noqa: PLW2901  # the report is older than what we know
            hosted[replica.replica_id] = replica
        self._time_starts(report.worker_id, hosted, now_s)
        changed = new or hosted != worker.hosted or report.leaving != worker.leaving
        worker.hosted, worker.leaving = hosted, report.leaving
        return changed

    def on_event(
        self, event: ReplicaStarted | ReplicaDrained | ReplicaStopped | ReplicaFailed
    ) -> None:
        part = (event.worker_id, event.replica_id)
        self.epoch_max = max(self.epoch_max, event.epoch)
        match event:
            case ReplicaStarted():
                self._update(part, event.epoch, "serving")
            case ReplicaDrained():
                self._drained[part] = max(event.epoch, self._drained.get(part, 0))
                self._update(part, event.epoch, "draining")
            case ReplicaFailed():
                self.failures[part] = self.failures.get(part, 0) + 1
                self._update(part, event.epoch, "failed", event.detail)
            case ReplicaStopped():
                self._stopped[part] = max(event.epoch, self._stopped.get(part, 0))
                held = self.held(part)
                self._starting_s.pop(part, None)
                if held is not None and held.epoch <= event.epoch:
                    del self._workers[part[0]].hosted[part[1]]

    def prune(self, *, epoch: int, now_s: float) -> None:
        """Forget what no longer matters once ``epoch`` is in force, to stay bounded."""
        self._stopped = {p: e for p, e in self._stopped.items() if e >= epoch}
        self._drained = {p: e for p, e in self._drained.items() if e >= epoch}
        self.failures.clear()
        self._starting_s = {p: s for p, s in self._starting_s.items() if p[0] in self._workers}
        self._workers = {w: v for w, v in self._workers.items() if not self.gone(w, now_s)}

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
        return worker is not None and worker.leaving

    def hosted(self, worker_id: str) -> dict[str, HostedReplica]:
        worker = self._workers.get(worker_id)
        return {} if worker is None else worker.hosted

    def held(self, part: Part) -> HostedReplica | None:
        return self.hosted(part[0]).get(part[1])

    def stopped(self, part: Part, *, epoch: int) -> bool:
        """Whether the worker said so in answer to a command of ``epoch`` or later."""
        return self._stopped.get(part, -1) >= epoch

    def drained(self, part: Part, *, epoch: int) -> bool:
        return self._drained.get(part, -1) >= epoch

    def starting_for_s(self, part: Part, now_s: float) -> float:
        """How long the worker has said that it starts the replica; 0 if it does not."""
        return now_s - self._starting_s.get(part, now_s)

    def _time_starts(self, worker_id: str, hosted: dict[str, HostedReplica], now_s: float) -> None:
        now_starting = {(worker_id, r) for r, held in hosted.items() if held.phase == "starting"}
        for part in [p for p in self._starting_s if p[0] == worker_id and p not in now_starting]:
            del self._starting_s[part]
        for part in sorted(now_starting):
            self._starting_s.setdefault(part, now_s)

    def _forget(self, worker_id: str) -> None:
        """A new incarnation has none of what the former one held, and nothing refused."""
        for memory in (self._stopped, self._drained, self._starting_s):
            for part in [p for p in memory if p[0] == worker_id]:
                del memory[part]

    def _update(self, part: Part, epoch: int, phase: ReplicaPhase, detail: str = "") -> None:
        held = self.held(part)
        if held is not None and held.epoch <= epoch:
            self._workers[part[0]].hosted[part[1]] = msgspec.structs.replace(
                held, epoch=epoch, phase=phase, detail=detail
            )
