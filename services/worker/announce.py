"""The events by which a worker tells the mesh what became of a command."""

from collections.abc import Iterator

from services.worker.events import EngineTook
from services.worker.replica import Hosted
from shared.core import Effect, Log, Publish
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPrepared,
    ReplicaStarted,
    ReplicaStopped,
    RequestsTaken,
)
from shared.subjects import (
    REPLICA_DRAINED,
    REPLICA_FAILED,
    REPLICA_PAUSED,
    REPLICA_PREPARED,
    REPLICA_STARTED,
    REPLICA_STOPPED,
    REQUESTS_TAKEN,
)


class Announcer:
    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def started(self, hosted: Hosted) -> Publish:
        event = ReplicaStarted(
            epoch=hosted.epoch,
            worker_id=self._worker_id,
            replica_id=hosted.replica_id,
            pauses=hosted.moves.pauses,
        )
        return REPLICA_STARTED.send(event, replica_id=hosted.replica_id)

    def prepared(self, hosted: Hosted) -> Publish:
        event = ReplicaPrepared(
            epoch=hosted.moves.prepared,
            worker_id=self._worker_id,
            replica_id=hosted.replica_id,
            bytes_by_source=dict(hosted.moves.bytes_by_source),
            took_s=hosted.moves.took_s,
        )
        return REPLICA_PREPARED.send(event, replica_id=hosted.replica_id)

    def paused(self, hosted: Hosted) -> Publish:
        event = ReplicaPaused(
            epoch=hosted.epoch,
            worker_id=self._worker_id,
            replica_id=hosted.replica_id,
            requests=len(hosted.live),
        )
        return REPLICA_PAUSED.send(event, replica_id=hosted.replica_id)

    def taken(self, took: EngineTook) -> Publish:
        event = RequestsTaken(
            epoch=took.epoch,
            worker_id=self._worker_id,
            replica_id=took.replica_id,
            moved=took.moved,
            replayed=took.replayed,
            bytes_by_source=took.bytes_by_source,
            ahead_bytes=took.ahead_bytes,
            bytes_needed=took.bytes_needed,
            took_s=took.took_s,
            detail=took.detail,
        )
        return REQUESTS_TAKEN.send(event, replica_id=took.replica_id)

    def drained(self, replica_id: str, epoch: int, *, handed_back: int = 0) -> Publish:
        event = ReplicaDrained(
            epoch=epoch,
            worker_id=self._worker_id,
            replica_id=replica_id,
            handed_back=handed_back,
        )
        return REPLICA_DRAINED.send(event, replica_id=replica_id)

    def stopped(self, replica_id: str, epoch: int) -> Publish:
        event = ReplicaStopped(epoch=epoch, worker_id=self._worker_id, replica_id=replica_id)
        return REPLICA_STOPPED.send(event, replica_id=replica_id)

    def refused(self, replica_id: str, epoch: int, detail: str) -> Iterator[Effect]:
        """What a command asks is not done, and nothing else has changed."""
        event = ReplicaFailed(
            epoch=epoch,
            worker_id=self._worker_id,
            replica_id=replica_id,
            detail=detail,
            refused=True,
        )
        yield REPLICA_FAILED.send(event, replica_id=replica_id)
        fields = {"replica_id": replica_id, "epoch": epoch, "detail": detail}
        yield Log("command.refused", fields, "warning")

    def failed(
        self, replica_id: str, epoch: int, detail: str, *, requests_lost: int = 0
    ) -> Iterator[Effect]:
        event = ReplicaFailed(
            epoch=epoch, worker_id=self._worker_id, replica_id=replica_id, detail=detail
        )
        yield REPLICA_FAILED.send(event, replica_id=replica_id)
        fields = {
            "replica_id": replica_id,
            "epoch": epoch,
            "detail": detail,
            "requests_lost": requests_lost,
        }
        yield Log("replica.failed", fields, "error")
