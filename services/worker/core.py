"""Worker core: hosts replicas, admits requests, reports. Pure: no IO, no clock, no randomness.

    (absent) -> starting -> serving -> draining -> (absent)
                    |          |  <- resume - |
                    +-> failed <-+------------+

Messages may be late, lost, repeated or out of order. Commands carry an epoch, and one lower than
the highest seen for its replica is ignored; a command that is already done repeats its event. Each
attempt at a request that is admitted ends exactly once here: by the engine's last chunk, by a last
chunk of ours (failed, refused), or in silence when its ingress aborted it. Tokens do not pass
through: the core knows which attempts are live, the engine knows what they say.
"""

from collections.abc import Iterable, Iterator
from typing import assert_never

from services.worker.config import WorkerConfig
from services.worker.events import (
    ABORT,
    ADMIT,
    MEASURE,
    Admission,
    DrainDeadline,
    EngineAbort,
    EngineBroken,
    EngineLoads,
    EngineReady,
    EngineStopped,
    ReplicaReportTick,
    RequestRefused,
    RequestsEnded,
    WorkerReportTick,
)  # fmt: skip
from services.worker.hosting import Hosting
from services.worker.identity import WorkerIdentity
from services.worker.replica import Ending, Hosted, LiveRequest, Settled
from services.worker.reporting import noticeable
from shared.core import Draining, Effect, Publish, SetTimer, Start, Started
from shared.messages.replicas import DrainReplica, ResumeReplica, StartReplica, StopReplica
from shared.messages.requests import AbortRequest, SubmitRequest, TokenChunk
from shared.subjects import (
    ABORT_REQUEST,
    DRAIN_REPLICA,
    REPLICA_REPORT,
    RESUME_REPLICA,
    START_REPLICA,
    STOP_REPLICA,
    SUBMIT_REQUEST,
)  # fmt: skip

INPUTS = (
    SUBMIT_REQUEST, ABORT_REQUEST, START_REPLICA, DRAIN_REPLICA, STOP_REPLICA, RESUME_REPLICA,
)  # fmt: skip
Command = StartReplica | DrainReplica | StopReplica | ResumeReplica
EngineEvent = EngineReady | EngineBroken | EngineStopped
Tick = ReplicaReportTick | WorkerReportTick | DrainDeadline
WorkerEvent = (
    SubmitRequest | AbortRequest | RequestRefused | RequestsEnded | EngineLoads
    | Command | EngineEvent | Tick | Started | Draining
)  # fmt: skip

ABSENT = Ending(finish="refused", failure="stale_epoch", detail="replica is not served here")
NOT_SERVING = Ending(finish="refused", failure="stale_epoch", detail="replica is not serving yet")
DRAINS = Ending(finish="refused", failure="draining", detail="replica drains")


class WorkerCore:
    def __init__(self, config: WorkerConfig, identity: WorkerIdentity) -> None:
        self._config = config
        self._identity = identity
        self._settled = Settled(config.settled_max)
        self._hosting = Hosting(identity, settled=self._settled, replicas_max=config.replicas_max)

    def step(self, event: WorkerEvent, now_s: float) -> list[Effect]:
        match event:  # the two of the hot path come first
            case SubmitRequest():
                effects = self._on_submit(event)
            case RequestsEnded():
                effects = self._on_requests_ended(event)
            case RequestRefused():
                effects = self._on_request_refused(event)
            case AbortRequest():
                effects = self._on_abort(event)
            case EngineLoads():
                effects = self._on_engine_loads(event, now_s)
            case ReplicaReportTick():
                effects = self._on_replica_report_tick(now_s)
            case WorkerReportTick():
                effects = self._on_worker_report_tick(now_s)
            case Started():
                effects = (
                    SetTimer(now_s + self._config.report_s, ReplicaReportTick()),
                    SetTimer(now_s, WorkerReportTick()),
                )
            case _:
                effects = self._on_hosting(event, now_s)
        done = list(effects)
        if self._hosting.changed:
            done.extend(self._report_changes(now_s))
        return done

    def check(self) -> None:
        self._hosting.check()
        assert len(self._settled) <= self._config.settled_max
        seen: set[str] = set()
        for hosted in self._hosting.replicas.values():
            for request in hosted.live.values():
                assert request.request_id not in seen, f"{request} is live twice"
                assert not self._settled.covers(request.request_id, request.attempt), request
                seen.add(request.request_id)

    @property
    def drained(self) -> bool:
        """Told to leave, and nothing is hosted any more: the process may end."""
        return self._hosting.leaving and not self._hosting.replicas

    @property
    def live(self) -> list[LiveRequest]:
        """The attempts that run here, for tests and for the simulator's checks."""
        return [r for hosted in self._hosting.replicas.values() for r in hosted.live.values()]

    def _on_submit(self, submit: SubmitRequest) -> list[Effect]:
        if self._settled.covers(submit.request_id, submit.attempt):
            return []
        effects: list[Effect] = []
        older = self._find(submit.request_id)
        if older is not None:
            if older.attempt > submit.attempt:
                return []
            if older.attempt == submit.attempt:
                return [self._to_ingress(submit)]
            effects.append(self._abort(older))
        hosted = self._hosting.replicas.get(submit.replica_id)
        refusal = _refusal(hosted)
        if refusal is not None or hosted is None:
            self._settled.add(submit.request_id, submit.attempt)
            effects.append(self._to_ingress(submit, refusal))
        else:
            key = f"{submit.request_id}/{submit.attempt}"
            hosted.admit(
                LiveRequest(
                    submit.request_id, submit.attempt, submit.ingress_id, submit.replica_id, key
                )
            )
            effects += (Start(ADMIT, Admission(key, submit)), self._to_ingress(submit))
        if older is not None:
            effects.extend(self._settle(older.replica_id))
        return effects

    def _on_requests_ended(self, event: RequestsEnded) -> Iterable[Effect]:
        replicas: set[str] = set()
        for ended in event.ended:
            live = self._find(ended.request_id)
            if live is not None and live.attempt == ended.attempt:
                self._forget(live)
                replicas.add(live.replica_id)
        for replica_id in sorted(replicas):
            yield from self._settle(replica_id)

    def _on_request_refused(self, event: RequestRefused) -> Iterable[Effect]:
        live = self._find(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self._forget(live)
        ending = Ending(finish="refused", failure=event.failure, detail=event.detail)
        yield from self._identity.endings((live,), ending, replica_id=live.replica_id)
        yield from self._settle(live.replica_id)

    def _on_abort(self, abort: AbortRequest) -> Iterable[Effect]:
        live = self._find(abort.request_id)
        if live is not None and live.attempt <= abort.attempt:
            yield self._abort(live)
            yield from self._settle(live.replica_id)
        # It may have overtaken the submission, which must then not be run.
        self._settled.add(abort.request_id, abort.attempt)

    def _on_engine_loads(self, event: EngineLoads, now_s: float) -> Iterable[Effect]:
        for engine in event.engines:
            hosted = self._hosting.replicas.get(engine.replica_id)
            if hosted is not None and hosted.generation == engine.generation:
                hosted.measured = engine
        for hosted in self._hosting.replicas.values():
            if hosted.leads:
                yield from self._replica_report(hosted, now_s)
            yield from self._heartbeats(hosted, now_s)

    def _on_replica_report_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.report_s, ReplicaReportTick())
        yield Start(MEASURE, None)

    def _on_worker_report_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.worker_report_s, WorkerReportTick())
        yield self._worker_report()

    def _on_hosting(
        self, event: Command | EngineEvent | DrainDeadline | Draining, now_s: float
    ) -> Iterable[Effect]:
        match event:
            case StartReplica():
                effects = self._hosting.start(event)
            case DrainReplica():
                effects = self._hosting.drain(event, now_s)
            case StopReplica():
                effects = self._hosting.stop(event)
            case ResumeReplica():
                effects = self._hosting.resume(event)
            case EngineReady():
                effects = self._hosting.engine_ready(event)
            case EngineBroken():
                effects = self._hosting.engine_broken(event)
            case EngineStopped():
                effects = self._hosting.engine_stopped(event)
            case DrainDeadline():
                effects = self._hosting.deadline(event)
            case Draining():
                effects = self._on_draining(now_s)
            case _:
                assert_never(event)
        return effects

    def _on_draining(self, now_s: float) -> Iterable[Effect]:
        yield from self._hosting.leave(deadline_s=now_s + self._config.drain_timeout_s)
        yield self._worker_report()

    def _find(self, request_id: str) -> LiveRequest | None:
        for hosted in self._hosting.replicas.values():  # one or two
            live = hosted.live.get(request_id)
            if live is not None:
                return live
        return None

    def _forget(self, live: LiveRequest) -> None:
        self._hosting.replicas[live.replica_id].forget(live)
        self._settled.add(live.request_id, live.attempt)

    def _abort(self, live: LiveRequest) -> Effect:
        self._forget(live)
        return Start(ABORT, EngineAbort(live.replica_id, live.key))

    def _settle(self, replica_id: str) -> Iterator[Effect]:
        return self._hosting.settle(self._hosting.replicas[replica_id])

    def _to_ingress(self, submit: SubmitRequest, refusal: Ending | None = None) -> Publish:
        """The acknowledgement of a submission, or its refusal."""
        chunk = (
            TokenChunk(request_id=submit.request_id, attempt=submit.attempt)
            if refusal is None
            else refusal.chunk(request_id=submit.request_id, attempt=submit.attempt)
        )
        return self._identity.chunks(
            submit.ingress_id, replica_id=submit.replica_id, chunks=(chunk,)
        )

    def _heartbeats(self, hosted: Hosted, now_s: float) -> Iterator[Effect]:
        """Tell each ingress that waits that its requests are alive, while they are: an engine
        stuck in a step sends none, and the ingress moves on."""
        measured = hosted.measured
        if measured is None or measured.stalled or not hosted.ingresses:
            return
        if now_s + self._config.report_s <= hosted.heartbeat_s + self._config.heartbeat_s:
            return  # the next report is still in time
        hosted.heartbeat_s = now_s
        for ingress_id in hosted.ingresses:
            yield self._identity.chunks(ingress_id, replica_id=hosted.spec.replica_id)

    def _replica_report(self, hosted: Hosted, now_s: float) -> Iterator[Effect]:
        """Its load, if that is news, or nobody has heard of it for long."""
        report = self._identity.replica_report(hosted)
        news = hosted.told is None or noticeable(report, hosted.told)
        # Waiting for the next measurement would be too long.
        due = now_s + self._config.report_s > hosted.told_s + self._config.report_keepalive_s
        if news or due:
            hosted.told, hosted.told_s = report, now_s
            yield REPLICA_REPORT.send(report, replica_id=report.replica_id)

    def _report_changes(self, now_s: float) -> Iterator[Effect]:
        for replica_id in sorted(self._hosting.changed):
            hosted = self._hosting.replicas.get(replica_id)
            if hosted is not None and hosted.leads:
                yield from self._replica_report(hosted, now_s)
        self._hosting.changed.clear()
        yield self._worker_report()

    def _worker_report(self) -> Publish:
        hosting = self._hosting
        return self._identity.worker_report(hosting.replicas.values(), leaving=hosting.leaving)


def _refusal(hosted: Hosted | None) -> Ending | None:
    """Why the replica takes no request; None if it does."""
    if hosted is None or not hosted.leads:
        return ABSENT
    match hosted.phase:
        case "serving":
            return None
        case "draining":
            return DRAINS
        case "starting" | "failed":
            return NOT_SERVING
