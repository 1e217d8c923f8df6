"""Worker core: hosts replicas, admits requests, reports. Pure: no IO, no clock, no randomness.

    (absent) -> starting -> serving -> draining -> (absent)
                    |        | | ^ <- resume - |
                    |        | | |
       preparing -> prepared + | + resume - paused -> (absent)
                               +--- pause --> |

From anywhere to failed when the engine breaks. Messages may be late, lost, repeated or out of
order. Commands carry an epoch, and one lower than the highest seen for its replica is ignored; a
command that is already done repeats its event. Each attempt at a request that is admitted ends
exactly once here, or moves to another replica: it ends by the engine's last chunk, by a last chunk
of ours (failed, refused), or in silence when its ingress aborted it. Tokens do not pass through:
the core knows which attempts are live, the engine knows what they say.
"""

from collections.abc import Iterable, Iterator, Mapping

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
    EnginePaused,
    EngineReady,
    EngineReleased,
    EngineStaged,
    EngineStopped,
    EngineTook,
    ReplicaReportTick,
    RequestRefused,
    RequestsEnded,
    WorkerReportTick,
)  # fmt: skip
from services.worker.hosting import Command, Hosting
from services.worker.identity import WorkerIdentity
from services.worker.replica import Ending, Hosted, LiveRequest
from services.worker.reports import Reports
from services.worker.roster import Moved, Roster, Settled
from shared import subjects
from shared.core import Draining, Effect, Publish, SetTimer, Start, Started
from shared.messages.requests import AbortRequest, SubmitRequest, TokenChunk

INPUTS = (
    subjects.SUBMIT_REQUEST, subjects.ABORT_REQUEST, subjects.START_REPLICA,
    subjects.DRAIN_REPLICA, subjects.STOP_REPLICA, subjects.RESUME_REPLICA,
    subjects.PREPARE_REPLICA, subjects.PAUSE_REPLICA, subjects.TAKE_REQUESTS,
    subjects.ADVANCE_STAGE, subjects.GROW_CACHE,
)  # fmt: skip
EngineEvent = (
    EngineReady | EngineBroken | EngineStopped
    | EnginePaused | EngineTook | EngineReleased | EngineStaged
)  # fmt: skip
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
        self._moved = Moved(config.moved_max)
        self._roster = Roster(identity=identity, settled=self._settled, moved=self._moved)
        self._hosting = Hosting(
            self._roster,
            replicas_max=config.replicas_max,
            pause_patience_s=config.pause_patience_s,
        )
        self._moving = self._hosting.moving
        self._reports = Reports(config, self._roster)

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
                effects = self._reports.on_engine_loads(event, now_s)
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
        if self._roster.changed:
            done.extend(self._reports.changes(now_s))
        return done

    def check(self) -> None:
        self._hosting.check()
        assert len(self._settled) <= self._config.settled_max
        assert len(self._moved) <= self._config.moved_max
        live: dict[str, Hosted] = {}
        held: set[str] = set()
        for hosted in self._roster.replicas.values():
            for request in hosted.live.values():
                assert request.request_id not in live, f"{request} is live twice"
                assert not self._gone(request.request_id, request.attempt), request
                live[request.request_id] = hosted
            assert not hosted.moves.held.keys() & held, "held by two replicas"
            held |= hosted.moves.held.keys()

    @property
    def drained(self) -> bool:
        """Told to leave, and nothing is hosted any more: the process may end."""
        return self._roster.leaving and not self._roster.replicas

    @property
    def replicas(self) -> Mapping[str, Hosted]:
        """What is hosted here, for tests and for the simulator's checks."""
        return self._roster.replicas

    @property
    def live(self) -> list[LiveRequest]:
        """The attempts that run here, for the same."""
        return [r for hosted in self.replicas.values() for r in hosted.live.values()]

    @property
    def held(self) -> list[LiveRequest]:
        """Those that were taken over and wait for their replica's start."""
        return [r for hosted in self.replicas.values() for r in hosted.moves.held.values()]

    def _on_submit(self, submit: SubmitRequest) -> list[Effect]:
        if self._gone(submit.request_id, submit.attempt):
            return []
        effects: list[Effect] = []
        older = self._find(submit.request_id)
        if older is not None:
            if older.attempt > submit.attempt:
                return []
            if older.attempt == submit.attempt:
                return [self._to_ingress(submit)]
            effects.extend(self._abort(older))
        if older is None and self._moving.holds(submit.request_id, submit.attempt):
            return []  # a late copy: its replica has gone, and it is about to go on here
        effects.extend(self._moving.drop_held(submit.request_id, submit.attempt - 1))
        hosted = self._roster.replicas.get(submit.replica_id)
        refusal = self._refusal(hosted)
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
            yield from self._abort(live)
            yield from self._settle(live.replica_id)
        yield from self._moving.drop_held(abort.request_id, abort.attempt)
        leader = self._moved.pursue(abort.request_id, abort.attempt)
        if leader:
            yield subjects.ABORT_REQUEST.send(abort, worker_id=leader)
        # It may have overtaken the submission, or the request may have moved away from here:
        # neither must be run after this.
        self._settled.add(abort.request_id, abort.attempt)

    def _on_replica_report_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.report_s, ReplicaReportTick())
        yield Start(MEASURE, None)

    def _on_worker_report_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.worker_report_s, WorkerReportTick())
        yield self._reports.worker_report()

    def _on_hosting(
        self, event: Command | EngineEvent | DrainDeadline | Draining, now_s: float
    ) -> Iterable[Effect]:
        match event:
            case EngineReady() | EngineBroken() | EngineStopped():
                return self._hosting.hear(event)
            case EnginePaused() | EngineTook() | EngineReleased() | EngineStaged():
                return self._hosting.moves_on(event, now_s)
            case DrainDeadline():
                return self._hosting.deadline(event)
            case Draining():
                return self._on_draining(now_s)
            case _:
                return self._hosting.obey(event, now_s)

    def _on_draining(self, now_s: float) -> Iterable[Effect]:
        yield from self._hosting.leave(now_s, timeout_s=self._config.drain_timeout_s)
        yield self._reports.worker_report()

    def _gone(self, request_id: str, attempt: int) -> bool:
        """Whether the attempt must not run here any more: ended, aborted, or moved away."""
        return self._settled.covers(request_id, attempt) or self._moved.covers(request_id, attempt)

    def _find(self, request_id: str) -> LiveRequest | None:
        for hosted in self._roster.replicas.values():  # one or two
            live = hosted.live.get(request_id)
            if live is not None:
                return live
        return None

    def _forget(self, live: LiveRequest) -> None:
        self._roster.replicas[live.replica_id].forget(live)
        self._settled.add(live.request_id, live.attempt)

    def _abort(self, live: LiveRequest) -> Iterator[Effect]:
        """Whoever is taking the attempt over hears of it, too."""
        moving = self._roster.replicas[live.replica_id].moves.moving
        leader = moving.get(live.request_id, self._identity.worker_id)
        self._forget(live)
        yield Start(ABORT, EngineAbort(live.replica_id, live.key))
        if leader != self._identity.worker_id:
            abort = AbortRequest(
                request_id=live.request_id, attempt=live.attempt, replica_id=live.replica_id
            )
            yield subjects.ABORT_REQUEST.send(abort, worker_id=leader)

    def _settle(self, replica_id: str) -> Iterator[Effect]:
        return self._hosting.settle(self._roster.replicas[replica_id])

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

    def _refusal(self, hosted: Hosted | None) -> Ending | None:
        """Why the replica takes no request; None if it does. A paused one keeps it until it is
        resumed, or hands it back when it is stopped."""
        if hosted is None or not hosted.leads:
            return ABSENT
        match hosted.phase:
            case "serving":
                return None
            case "paused":
                return DRAINS if self._roster.leaving else None
            case "draining":
                return DRAINS
            case "starting" | "preparing" | "prepared" | "failed":
                return NOT_SERVING
