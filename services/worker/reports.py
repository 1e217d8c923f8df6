"""What a worker tells the mesh without being asked: its replicas' loads, itself, signs of life."""

from collections.abc import Iterator

from services.worker.config import WorkerConfig
from services.worker.events import EngineLoads
from services.worker.replica import Hosted
from services.worker.reporting import noticeable
from services.worker.roster import Roster
from shared.core import Effect, Publish
from shared.subjects import REPLICA_REPORT


class Reports:
    def __init__(self, config: WorkerConfig, roster: Roster) -> None:
        self._config, self._roster = config, roster
        self._identity = roster.identity
        self._number = 0  # of the last report of the worker itself

    def on_engine_loads(self, event: EngineLoads, now_s: float) -> Iterator[Effect]:
        for engine in event.engines:
            hosted = self._roster.of_generation(engine.replica_id, engine.generation)
            if hosted is not None:
                hosted.measured = engine
        for hosted in self._roster.replicas.values():
            if hosted.leads:
                yield from self._replica_report(hosted, now_s)
            yield from self._heartbeats(hosted, now_s)

    def changes(self, now_s: float) -> Iterator[Effect]:
        """Of what others should hear at once."""
        for replica_id in sorted(self._roster.changed):
            hosted = self._roster.replicas.get(replica_id)
            if hosted is not None and hosted.leads:
                yield from self._replica_report(hosted, now_s)
        self._roster.changed.clear()
        yield self.worker_report()

    def worker_report(self) -> Publish:
        roster = self._roster
        self._number += 1
        return self._identity.worker_report(
            roster.replicas.values(), leaving=roster.leaving, number=self._number
        )

    def _heartbeats(self, hosted: Hosted, now_s: float) -> Iterator[Effect]:
        """Tell each ingress that waits that its requests are alive, while they are: an engine
        stuck in a step sends none, nor one that is paused for long, and the ingress moves on."""
        measured = hosted.measured
        if measured is None or measured.stalled or not hosted.ingresses:
            return
        if (
            hosted.phase == "paused"
            and now_s - hosted.moves.paused_s > self._config.pause_patience_s
        ):
            return
        if now_s + self._config.report_s <= hosted.heartbeat_s + self._config.heartbeat_s:
            return  # the next report is still in time
        hosted.heartbeat_s = now_s
        for ingress_id in hosted.ingresses:
            yield self._identity.heartbeat(ingress_id, replica_id=hosted.replica_id)

    def _replica_report(self, hosted: Hosted, now_s: float) -> Iterator[Effect]:
        """Its load, if that is news, or nobody has heard of it for long."""
        report = self._identity.replica_report(hosted)
        news = hosted.told is None or noticeable(report, hosted.told)
        # Waiting for the next measurement would be too long.
        due = now_s + self._config.report_s > hosted.told_s + self._config.report_keepalive_s
        if news or due:
            hosted.told, hosted.told_s = report, now_s
            yield REPLICA_REPORT.send(report, replica_id=report.replica_id)
