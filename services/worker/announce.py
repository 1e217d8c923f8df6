"""The events by which a worker tells the mesh what became of a command."""

from collections.abc import Iterator

from shared.core import Effect, Log, Publish
from shared.messages.replicas import ReplicaDrained, ReplicaFailed, ReplicaStarted, ReplicaStopped
from shared.subjects import REPLICA_DRAINED, REPLICA_FAILED, REPLICA_STARTED, REPLICA_STOPPED


class Announcer:
    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def started(self, replica_id: str, epoch: int) -> Publish:
        event = ReplicaStarted(epoch=epoch, worker_id=self._worker_id, replica_id=replica_id)
        return REPLICA_STARTED.send(event, replica_id=replica_id)

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
