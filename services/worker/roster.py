"""What the halves of a worker's core share: the replicas hosted, and the attempts long gone."""

from collections import OrderedDict
from dataclasses import dataclass, field

from services.worker.identity import WorkerIdentity
from services.worker.replica import Hosted


class Settled:
    """The newest attempt of each recent request that must not run here any more: it ended, was
    refused, or was aborted, perhaps before its submission arrived. Bounded: the oldest go."""

    def __init__(self, settled_max: int) -> None:
        self._max = settled_max
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, request_id: str, attempt: int) -> None:
        known = self._attempts.get(request_id, -1)
        if attempt > known:
            self._attempts[request_id] = attempt
            if len(self._attempts) > self._max:
                self._attempts.popitem(last=False)

    def covers(self, request_id: str, attempt: int) -> bool:
        return attempt <= self._attempts.get(request_id, -1)


class Moved:
    """Attempts that went on elsewhere: which attempt, and the worker that leads it now. What comes
    for them late is not run here again, and an abort follows them. Bounded: the oldest go."""

    def __init__(self, moved_max: int) -> None:
        self._max = moved_max
        self._attempts: OrderedDict[str, tuple[int, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, request_id: str, attempt: int, worker_id: str) -> None:
        self._attempts[request_id] = (attempt, worker_id)
        self._attempts.move_to_end(request_id)
        if len(self._attempts) > self._max:
            self._attempts.popitem(last=False)

    def back(self, request_id: str) -> None:
        """It was taken over by this worker."""
        self._attempts.pop(request_id, None)

    def covers(self, request_id: str, attempt: int) -> bool:
        known = self._attempts.get(request_id)
        return known is not None and attempt <= known[0]

    def pursue(self, request_id: str, attempt: int) -> str:
        """Where an abort of ``attempt`` is to go as well; "" for nowhere. It follows once: two
        workers that have moved an attempt to each other would else send it to and fro for ever."""
        known = self._attempts.get(request_id)
        if known is None or known[0] > attempt:
            return ""
        del self._attempts[request_id]
        return known[1]


@dataclass(slots=True, kw_only=True, eq=False)
class Roster:
    """``changed`` collects the replicas whose state others should hear of at once."""

    identity: WorkerIdentity
    settled: Settled
    moved: Moved
    replicas: dict[str, Hosted] = field(default_factory=dict[str, Hosted])
    changed: set[str] = field(default_factory=set[str])
    leaving: bool = False  # the process was told to end

    def of_generation(self, replica_id: str, generation: int) -> Hosted | None:
        hosted = self.replicas.get(replica_id)
        return hosted if hosted is not None and hosted.generation == generation else None
