"""How a hosted replica gets from one phase to the next: the moves that several events share."""

from collections.abc import Iterator

import msgspec

from services.worker.announce import Announcer
from services.worker.events import (
    START_ENGINE,
    STOP_ENGINE,
    DrainDeadline,
    EngineStart,
    EngineStop,
)
from services.worker.moving import Moving, log_of
from services.worker.replica import Ending, Hosted, Moves
from services.worker.roster import Roster
from shared.core import Effect, SetTimer, Start
from shared.messages.replicas import PrepareReplica, ReplicaPhase

HANDED_BACK = Ending(finish="failed", failure="draining", detail="handed back: replica drains")


class Life:
    def __init__(self, roster: Roster, moving: Moving) -> None:
        self._roster, self._moving = roster, moving
        self._announce = Announcer(roster.identity.worker_id)
        self._generation = 0

    def prepare(self, hosted: Hosted, command: PrepareReplica) -> Iterator[Effect]:
        moves = hosted.moves
        if moves.prepared == command.epoch:
            yield self._announce.prepared(hosted)
        elif hosted.phase == "failed" and hosted.works:
            yield from self._launch(hosted, "preparing", command)
        elif hosted.phase in {"preparing", "prepared"} and hosted.works:
            assert moves.order is not None
            if moves.order.epoch != command.epoch:
                # Its ranks have found each other under another epoch: they begin anew.
                yield from self.stop(hosted)
        elif hosted.phase in {"failed", "prepared"}:
            hosted.phase = "prepared"
            yield from self._moving.expect(hosted, command)
        elif (
            hosted.phase == "serving"
            and command.epoch != hosted.serve_epoch
            and not (moves.pausing or moves.releasing)
        ):
            moves.bytes_by_source, moves.took_s = {}, 0.0
            yield from self._moving.expect(hosted, command)
        elif hosted.phase in {"paused", "draining"}:  # what else there is passes by itself
            detail = f"cannot get ready: it is {hosted.phase}"
            yield from self._announce.refused(hosted.replica_id, command.epoch, detail)

    def serve(self, hosted: Hosted, *, keep: bool) -> Iterator[Effect]:
        """Bring a hosted replica to serving, from whatever phase it is in. ``keep``: with the
        requests taken over for this very epoch."""
        moves = hosted.moves
        if hosted.phase == "serving" and hosted.serve_epoch == hosted.epoch and not moves.pausing:
            if not moves.releasing:
                yield self._announce.started(hosted)
            return
        if hosted.lacks_layers:
            yield from self.stop(hosted)  # its repeat finds it gone, and loads it from disk
            return
        yield from self._moving.unpause(hosted)
        hosted.serve_epoch = hosted.epoch
        hosted.drained, hosted.drain_deadline_s, hosted.handed_back = False, None, 0
        moves.pauses, moves.stage, moves.staging = (), 0, 0
        self._roster.changed.add(hosted.replica_id)
        if hosted.engine == "starting":
            hosted.phase = "starting"
        elif hosted.works and hosted.engine == "none":
            yield from self._launch(hosted, "starting")
        elif keep and moves.taken == hosted.epoch:
            hosted.phase = "serving"
            yield from self._moving.go_on(hosted)
        else:
            yield from self._moving.give_up(hosted)
            hosted.phase, moves.releasing = "serving", 0
            yield self._announce.started(hosted)

    def _launch(
        self, hosted: Hosted, phase: ReplicaPhase, order: PrepareReplica | None = None
    ) -> Iterator[Effect]:
        self._generation += 1
        hosted.generation, hosted.engine, hosted.phase = self._generation, "starting", phase
        hosted.detail, hosted.measured = "", None
        hosted.cache_bytes = hosted.cache_bytes_full = 0
        hosted.moves = Moves(order=order)
        start = EngineStart(
            hosted.spec,
            hosted.generation,
            rank=hosted.rank,
            epoch=hosted.epoch,
            peers=hosted.peers,
        )
        if order is not None:
            start = msgspec.structs.replace(
                start,
                copies=tuple(copy for copy in order.copies if copy.sheet != "cache"),
                stages=order.stages,
                cache_bytes_max=order.cache_bytes_max,
                verify=order.verify,
            )
        self._roster.changed.add(hosted.replica_id)
        yield Start(START_ENGINE, start)
        yield log_of(f"replica.{phase}", hosted)

    def drain(self, hosted: Hosted, deadline_s: float) -> Iterator[Effect]:
        replica_id = hosted.replica_id
        if hosted.drained or hosted.phase == "failed":
            yield self._announce.drained(replica_id, hosted.epoch, handed_back=hosted.handed_back)
            if self._roster.leaving:
                yield from self.stop(hosted)
            return
        if hosted.lacks_layers:
            yield from self.stop(hosted)
            return
        if hosted.phase != "draining":
            yield from self._moving.unpause(hosted)
            yield from self._moving.give_up(hosted)
            hosted.phase, hosted.moves.releasing, hosted.moves.staging = "draining", 0, 0
            self._roster.changed.add(replica_id)
            yield log_of("replica.draining", hosted)
        # Commands are repeated: only a deadline earlier than the known one counts.
        known_s = hosted.drain_deadline_s
        if hosted.live and (known_s is None or deadline_s < known_s):
            yield self.set_deadline(hosted, deadline_s)
        yield from self.settle(hosted)

    def set_deadline(self, hosted: Hosted, at_s: float) -> SetTimer:
        hosted.drain_deadline_s = at_s
        timer = DrainDeadline(replica_id=hosted.replica_id, generation=hosted.generation, at_s=at_s)
        return SetTimer(at_s, timer)

    def stop(self, hosted: Hosted) -> Iterator[Effect]:
        if hosted.engine == "stopping":
            return
        yield from self.end_all(hosted, HANDED_BACK)
        if hosted.engine == "none":
            yield from self.remove(hosted)
            return
        self._roster.changed.add(hosted.replica_id)
        hosted.phase, hosted.engine, hosted.measured = "draining", "stopping", None
        hosted.drained, hosted.drain_deadline_s, hosted.moves = True, None, Moves()
        yield Start(STOP_ENGINE, EngineStop(hosted.replica_id, hosted.generation))

    def remove(self, hosted: Hosted) -> Iterator[Effect]:
        del self._roster.replicas[hosted.replica_id]
        self._roster.changed.add(hosted.replica_id)
        yield self._announce.stopped(hosted.replica_id, hosted.epoch)
        yield log_of("replica.stopped", hosted)

    def end_all(self, hosted: Hosted, ending: Ending) -> Iterator[Effect]:
        live = list(hosted.live.values())
        for request in live:
            self._roster.settled.add(request.request_id, request.attempt)
        hosted.live.clear()
        hosted.ingresses.clear()
        hosted.moves.moving.clear()
        yield from self._roster.identity.endings(live, ending, replica_id=hosted.replica_id)

    def settle(self, hosted: Hosted) -> Iterator[Effect]:
        """A draining replica whose last request has ended is drained, once."""
        if hosted.phase != "draining" or hosted.live or hosted.drained:
            return
        hosted.drained, hosted.drain_deadline_s = True, None
        self._roster.changed.add(hosted.replica_id)
        yield self._announce.drained(
            hosted.replica_id, hosted.epoch, handed_back=hosted.handed_back
        )
        if self._roster.leaving:
            yield from self.stop(hosted)
