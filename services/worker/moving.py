"""What a hosted replica does in a live switch: expect, pause, take over, let go on, by stages.

The other half of what follows commands (hosting.py has the first). A request that is taken over is
*held*: the engine has it, with its KV cache, but nobody hears of it until the plan is in force and
its replica is started under the epoch of the switch. Until then its old replica, paused, owns it.
"""

from collections.abc import Iterator

from services.worker.announce import Announcer
from services.worker.events import (
    ABORT,
    EXPECT,
    GROW,
    PAUSE_ENGINE,
    RELEASE,
    RESUME_ENGINE,
    STAGE,
    TAKE,
    EngineAbort,
    EngineExpect,
    EngineGrow,
    EnginePause,
    EnginePaused,
    EngineRelease,
    EngineReleased,
    EngineResume,
    EngineStage,
    EngineStaged,
    EngineTake,
    EngineTook,
    LiveAttempt,
)  # fmt: skip
from services.worker.replica import Hosted, LiveRequest
from services.worker.roster import Roster
from shared.core import Effect, Log, Start
from shared.messages.replicas import (
    AdvanceStage,
    GrowCache,
    PauseReplica,
    PrepareReplica,
    TakeRequests,
)

PASSING = frozenset({"starting", "preparing"})
"""Phases that end by themselves: what cannot be done in them can be when it is asked again."""


class Moving:
    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._announce = Announcer(roster.identity.worker_id)

    def expect(self, hosted: Hosted, command: PrepareReplica) -> Iterator[Effect]:
        """A replica whose engine is ready is prepared: KV cache may come ahead of the pause."""
        yield from self.give_up(hosted)
        moves = hosted.moves
        moves.order, moves.prepared = command, command.epoch
        self._roster.changed.add(hosted.replica_id)
        cache = tuple(copy for copy in command.copies if copy.sheet == "cache")
        if hosted.works and command.sources:
            moves.expecting = command.epoch
            order = EngineExpect(
                replica_id=hosted.replica_id,
                generation=hosted.generation,
                epoch=command.epoch,
                peers=command.peers,
                copies=cache,
                sources=command.sources,
                shares=command.shares,
                verify=command.verify,
            )
            yield Start(EXPECT, order)
        yield self._announce.prepared(hosted)
        yield log_of("replica.prepared", hosted)

    def pause(self, hosted: Hosted, command: PauseReplica) -> Iterator[Effect]:
        """Stand still; submissions that come are acknowledged and kept."""
        if not hosted.leads or (command.epoch == hosted.serve_epoch and hosted.phase != "paused"):
            return  # a late copy: within an epoch a replica is paused before it is resumed
        hosted.epoch, moves = command.epoch, hosted.moves
        if hosted.phase == "paused":
            yield self._announce.paused(hosted)
        elif hosted.phase != "serving":
            yield from self._decline(hosted, "stand still")
        elif not moves.releasing:  # else its repeat finds it ready
            yield from self.give_up(hosted)
            if not moves.pausing:
                order = EnginePause(hosted.replica_id, hosted.generation, command.shares)
                yield Start(PAUSE_ENGINE, order)
            moves.pausing = command.epoch

    def paused(self, hosted: Hosted, event: EnginePaused, now_s: float) -> Iterator[Effect]:
        moves = hosted.moves
        if not moves.pausing and hosted.phase != "paused":
            return  # resumed meanwhile: the engine hears of it right after this
        # Resumed and paused again, it may hear of both pauses: the later one tells what moves.
        moves.pausing, moves.paused_s, hosted.phase = 0, now_s, "paused"
        moves.moving = {
            request_id: worker_id
            for request_id, worker_id in event.moving.items()
            if request_id in hosted.live
        }
        self._roster.changed.add(hosted.replica_id)
        yield self._announce.paused(hosted)
        yield log_of("replica.paused", hosted)

    def unpause(self, hosted: Hosted) -> Iterator[Effect]:
        """Let a paused engine go on; whoever calls says in which phase the replica is then."""
        moves = hosted.moves
        if moves.pausing or hosted.phase == "paused":
            moves.pausing = moves.staging = 0
            moves.moving.clear()
            yield Start(RESUME_ENGINE, EngineResume(hosted.replica_id, hosted.generation))

    def leave_behind(self, hosted: Hosted) -> None:
        """The requests of a paused replica that live elsewhere from now on are forgotten."""
        for request_id, worker_id in list(hosted.moves.moving.items()):
            live = hosted.live[request_id]
            hosted.forget(live)
            if worker_id != self._roster.identity.worker_id:
                self._roster.moved.add(request_id, live.attempt, worker_id)

    def take(self, hosted: Hosted, command: TakeRequests) -> Iterator[Effect]:
        moves = hosted.moves
        if not hosted.leads or command.epoch == hosted.serve_epoch:
            return  # the latter a late copy: within an epoch requests are taken before the start
        hosted.epoch = command.epoch
        if hosted.phase not in {"prepared", "serving"} or hosted.lacks_layers:
            yield from self._decline(hosted, "take requests over")
        elif moves.pausing or moves.releasing:
            return  # its repeat finds it ready, or standing still
        elif moves.taken == command.epoch:
            assert moves.took is not None
            yield self._announce.taken(moves.took)
        elif moves.taking != command.epoch:
            if moves.taking or moves.taken:
                yield from self.give_up(hosted)
            moves.taking = command.epoch
            order = EngineTake(
                replica_id=hosted.replica_id,
                generation=hosted.generation,
                epoch=command.epoch,
                sources=command.sources,
                peers=command.peers,
                shares=command.shares,
            )
            yield Start(TAKE, order)

    def took(self, hosted: Hosted, event: EngineTook) -> Iterator[Effect]:
        moves = hosted.moves
        if moves.taking != event.epoch:
            return  # given up, and the engine has been told
        moves.taking = 0
        if event.failure:
            detail = f"cannot take requests over: {event.failure}"
            yield from self._announce.refused(hosted.replica_id, event.epoch, detail)
            return
        moves.taken, moves.took = event.epoch, event
        for attempt in event.taken:
            if self._unwanted(attempt):
                yield Start(ABORT, EngineAbort(hosted.replica_id, attempt.key))
                continue
            moves.held[attempt.request_id] = LiveRequest(
                attempt.request_id,
                attempt.attempt,
                attempt.ingress_id,
                hosted.replica_id,
                attempt.key,
            )
        self._roster.changed.add(hosted.replica_id)
        yield self._announce.taken(event)
        fields = {"moved": event.moved, "replayed": event.replayed, "detail": event.detail}
        yield log_of("requests.taken", hosted, **fields)

    def go_on(self, hosted: Hosted) -> Iterator[Effect]:
        """The requests held run here from now on, and their ingresses are told."""
        moves = hosted.moves
        requests = list(moves.held.values())
        for request in requests:
            self._adopt(hosted, request)
            if request.request_id not in hosted.live:
                yield Start(ABORT, EngineAbort(hosted.replica_id, request.key))
        moves.releasing = moves.taken
        moves.held.clear()
        moves.taken = moves.expecting = 0
        yield from self._roster.identity.acknowledgements(
            (r for r in requests if r.request_id in hosted.live), replica_id=hosted.replica_id
        )
        yield Start(RELEASE, _release(hosted, moves.releasing, keep=True))

    def released(self, hosted: Hosted, event: EngineReleased) -> Iterator[Effect]:
        moves = hosted.moves
        if moves.releasing == event.epoch:
            moves.releasing, moves.pauses = 0, event.pauses
            self._roster.changed.add(hosted.replica_id)
            yield self._announce.started(hosted)

    def give_up(self, hosted: Hosted) -> Iterator[Effect]:
        """Whatever was or is to be taken over stays where it is."""
        moves = hosted.moves
        epoch = moves.taking or moves.taken or moves.expecting
        moves.held.clear()
        moves.taking = moves.taken = moves.expecting = 0
        if epoch and hosted.leads and hosted.engine == "ready":
            yield Start(RELEASE, _release(hosted, epoch, keep=False))

    def advance(self, hosted: Hosted, command: AdvanceStage) -> Iterator[Effect]:
        moves = hosted.moves
        if not hosted.leads or command.epoch == hosted.serve_epoch:
            return  # the latter a late copy: within an epoch weights come before the start
        hosted.epoch = command.epoch
        if hosted.phase not in {"prepared", "paused"}:
            yield from self._decline(hosted, f"go on to stage {command.stage}")
        elif moves.stage >= command.stage:
            self._roster.changed.add(hosted.replica_id)  # the report says so
        elif not moves.staging:
            moves.staging = command.stage
            order = EngineStage(hosted.replica_id, hosted.generation, command.stage, command.layers)
            yield Start(STAGE, order)

    def staged(self, hosted: Hosted, event: EngineStaged) -> Iterator[Effect]:
        moves = hosted.moves
        if moves.staging != event.stage:
            return
        moves.stage, moves.staging = event.stage, 0
        for source, count in event.bytes_by_source.items():
            moves.bytes_by_source[source] = moves.bytes_by_source.get(source, 0) + count
        self._roster.changed.add(hosted.replica_id)
        if hosted.phase == "prepared":
            yield self._announce.prepared(hosted)

    def grow(self, hosted: Hosted, command: GrowCache) -> Iterator[Effect]:
        """Not in the middle of a switch, whose sides know the blocks by what they are now: the
        command comes again when that has ended."""
        moves = hosted.moves
        busy = moves.pausing or moves.expecting or moves.taking or moves.taken or moves.releasing
        if hosted.leads and hosted.phase == "serving" and not busy:
            hosted.epoch = command.epoch
            yield Start(GROW, EngineGrow(hosted.replica_id, hosted.generation))

    def drop_held(self, request_id: str, attempt: int) -> Iterator[Effect]:
        """Nobody wants the attempt any more, or an older one: not even once it may go on."""
        for hosted in self._roster.replicas.values():
            held = hosted.moves.held.get(request_id)
            if held is not None and held.attempt <= attempt:
                del hosted.moves.held[request_id]
                yield Start(ABORT, EngineAbort(hosted.replica_id, held.key))

    def holds(self, request_id: str, attempt: int) -> bool:
        held = (hosted.moves.held.get(request_id) for hosted in self._roster.replicas.values())
        return any(request is not None and request.attempt == attempt for request in held)

    def _decline(self, hosted: Hosted, what: str) -> Iterator[Effect]:
        """Say so at once where asking again would not help: a switch waits for the answer."""
        if hosted.phase == "failed":
            yield from self._announce.failed(hosted.replica_id, hosted.epoch, hosted.detail)
        elif hosted.phase not in PASSING and not hosted.moves.staging:
            lacks = ", and lacks layers" if hosted.lacks_layers else ""
            detail = f"cannot {what}: it is {hosted.phase}{lacks}"
            yield from self._announce.refused(hosted.replica_id, hosted.epoch, detail)

    def _unwanted(self, attempt: LiveAttempt) -> bool:
        """Aborted or replaced by a newer attempt, as far as this worker has heard, or held here
        by another replica already."""
        if self._roster.settled.covers(attempt.request_id, attempt.attempt):
            return True
        for hosted in self._roster.replicas.values():
            live = hosted.live.get(attempt.request_id)
            if live is not None and (live.attempt > attempt.attempt or hosted.phase != "paused"):
                return True
            if attempt.request_id in hosted.moves.held:
                return True
        return False

    def _adopt(self, hosted: Hosted, request: LiveRequest) -> None:
        """Make a held request a live one, unless the replica that had it went on with it."""
        if self._roster.settled.covers(request.request_id, request.attempt):
            return
        for other in self._roster.replicas.values():
            live = other.live.get(request.request_id)
            if live is None:
                continue
            if live.attempt != request.attempt or other.phase != "paused":
                return
            other.forget(live)
        self._roster.moved.back(request.request_id)
        hosted.admit(request)


def log_of(event: str, hosted: Hosted, **fields: object) -> Log:
    return Log(event, {"replica_id": hosted.replica_id, "epoch": hosted.epoch, **fields})


def _release(hosted: Hosted, epoch: int, *, keep: bool) -> EngineRelease:
    return EngineRelease(hosted.replica_id, hosted.generation, epoch, keep)
