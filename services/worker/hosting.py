"""The life of the replicas that a worker hosts: the half of its core that follows commands.

Each method answers one event with its effects. life.py holds what several of them do, moving.py
what is particular to a live switch.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from services.worker.announce import Announcer
from services.worker.events import (
    ABORT,
    DrainDeadline,
    EngineAbort,
    EngineBroken,
    EnginePaused,
    EngineReady,
    EngineReleased,
    EngineStaged,
    EngineStopped,
    EngineTook,
)  # fmt: skip
from services.worker.identity import WorkerIdentity
from services.worker.life import HANDED_BACK, Life
from services.worker.moving import Moving
from services.worker.replica import Ending, Hosted, Moves
from services.worker.roster import Roster
from shared.core import Effect, Start
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    GrowCache,
    PauseReplica,
    PrepareReplica,
    ResumeReplica,
    StartReplica,
    StopReplica,
    TakeRequests,
)

EPOCHS_MAX = 1024  # replicas whose highest epoch is remembered
LEAVING, GONE = "the worker is leaving", "not hosted here any more"

Command = (
    StartReplica | DrainReplica | StopReplica | ResumeReplica
    | PrepareReplica | PauseReplica | TakeRequests | AdvanceStage | GrowCache
)  # fmt: skip


class Hosting:
    def __init__(self, roster: Roster, *, replicas_max: int, pause_patience_s: float) -> None:
        self._roster = roster
        self._announce = Announcer(roster.identity.worker_id)
        self._replicas_max, self._patience_s = replicas_max, pause_patience_s
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._epoch_max = 0  # of all commands
        self.moving = Moving(roster)
        self._life = Life(roster, self.moving)

    def check(self) -> None:
        assert len(self._roster.replicas) <= self._replicas_max
        assert len(self._epochs) <= EPOCHS_MAX
        for replica_id, hosted in self._roster.replicas.items():
            assert replica_id == hosted.replica_id
            assert not self._roster.leaving or hosted.phase != "serving", hosted
            hosted.check()

    def obey(self, command: Command, now_s: float) -> Iterable[Effect]:
        """A command of an epoch lower than the highest seen for its replica is a late one."""
        replica_id = _replica_id(command)
        self._epoch_max = max(self._epoch_max, command.epoch)
        if self._outdated(replica_id, command.epoch):
            return ()
        if isinstance(command, PrepareReplica) and command.epoch < self._epoch_max:
            return ()  # of a switch that is over: one at a time, under an epoch of its own
        hosted = self._roster.replicas.get(replica_id)
        stopping = hosted is not None and hosted.engine == "stopping"
        if stopping and not isinstance(command, StopReplica | DrainReplica):
            return ()  # It is repeated until done: it comes again once this has ended.
        if isinstance(command, StartReplica | PrepareReplica):
            return self._host(command, hosted)
        if hosted is None:
            return self._answer_absent(command, replica_id)
        return self._obey_hosted(command, hosted, now_s)

    def hear(self, event: EngineReady | EngineBroken | EngineStopped) -> Iterable[Effect]:
        """What became of a start or a stop, or of an engine that ran."""
        hosted = self._roster.of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.engine == "none":
            return ()
        if hosted.engine == "stopping":
            return () if isinstance(event, EngineReady) else self._life.remove(hosted)
        if isinstance(event, EngineReady) and hosted.engine == "starting":
            return self._ready(hosted, event)
        return self._broken(hosted, event) if isinstance(event, EngineBroken) else ()

    def settle(self, hosted: Hosted) -> Iterator[Effect]:
        """One of its requests has ended or moved: perhaps the last that it waited for."""
        return self._life.settle(hosted)

    def moves_on(
        self, event: EnginePaused | EngineTook | EngineReleased | EngineStaged, now_s: float
    ) -> Iterable[Effect]:
        """What an engine says of the switch that its replica takes part in."""
        hosted = self._roster.of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.engine != "ready":
            return ()
        match event:
            case EnginePaused():
                return self.moving.paused(hosted, event, now_s)
            case EngineTook():
                return self.moving.took(hosted, event)
            case EngineReleased():
                return self.moving.released(hosted, event)
            case EngineStaged():
                return self.moving.staged(hosted, event)

    def deadline(self, event: DrainDeadline) -> Iterable[Effect]:
        """Hand back what outlived the drain: its ingress resubmits it elsewhere."""
        hosted = self._roster.of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.drain_deadline_s != event.at_s:
            return
        if hosted.phase == "paused":  # of a worker that leaves, and nobody has decided for long
            yield from self._life.stop(hosted)
            return
        for request in hosted.live.values():
            yield Start(ABORT, EngineAbort(event.replica_id, request.key))
        hosted.handed_back += len(hosted.live)
        yield from self._life.end_all(hosted, HANDED_BACK)
        yield from self._life.settle(hosted)

    def leave(self, now_s: float, *, timeout_s: float) -> Iterable[Effect]:
        """The process ends: drain everything, then stop it. What is paused waits a while for the
        end of its switch: its requests may be taken over already."""
        self._roster.leaving = True
        self._roster.changed.update(self._roster.replicas)
        for hosted in list(self._roster.replicas.values()):
            if hosted.phase == "paused":
                yield self._life.set_deadline(hosted, now_s + min(timeout_s, self._patience_s))
            elif hosted.engine != "stopping":
                yield from self._life.drain(hosted, now_s + timeout_s)

    def _ready(self, hosted: Hosted, event: EngineReady) -> Iterator[Effect]:
        hosted.engine, hosted.cache_bytes = "ready", event.cache_bytes
        hosted.cache_bytes_full = event.cache_bytes_full
        moves = hosted.moves
        moves.bytes_by_source, moves.took_s = dict(event.bytes_by_source), event.took_s
        self._roster.changed.add(event.replica_id)
        if hosted.phase == "starting":
            hosted.phase = "serving"
            yield self._announce.started(hosted)
        elif hosted.phase == "preparing":
            assert moves.order is not None
            hosted.phase = "prepared"
            yield from self.moving.expect(hosted, moves.order)

    def _broken(self, hosted: Hosted, event: EngineBroken) -> Iterator[Effect]:
        was_draining = hosted.phase == "draining" and not hosted.drained
        ending = Ending(finish="failed", failure="engine", detail=event.detail)
        lost = len(hosted.live)
        yield from self._life.end_all(hosted, ending)
        hosted.phase, hosted.engine, hosted.detail = "failed", "none", event.detail
        hosted.drained, hosted.drain_deadline_s, hosted.measured = False, None, None
        hosted.moves = Moves()
        yield from self._announce.failed(
            event.replica_id, hosted.epoch, event.detail, requests_lost=lost
        )
        self._roster.changed.add(event.replica_id)
        if was_draining:
            yield self._announce.drained(event.replica_id, hosted.epoch, handed_back=lost)
        if self._roster.leaving:
            yield from self._life.stop(hosted)

    def _outdated(self, replica_id: str, epoch: int) -> bool:
        seen = self._epochs.get(replica_id, -1)
        if epoch < seen:
            return True
        self._epochs[replica_id] = epoch
        self._epochs.move_to_end(replica_id)
        if len(self._epochs) > EPOCHS_MAX:
            self._epochs.popitem(last=False)
        return False

    def _host(
        self, command: StartReplica | PrepareReplica, hosted: Hosted | None
    ) -> Iterator[Effect]:
        spec = command.replica
        fault = self._fault(spec, hosted)
        if fault:
            # Hosted otherwise it has to be stopped first, like one that failed.
            otherwise = hosted is not None and not self._roster.leaving
            tell = self._announce.failed if otherwise else self._announce.refused
            yield from tell(spec.replica_id, command.epoch, fault)
            return
        if hosted is None:
            rank = spec.gpus.index(self._roster.identity.worker_id)
            hosted = self._roster.replicas[spec.replica_id] = Hosted(
                spec=spec,
                rank=rank,
                works=rank == 0 or self._roster.identity.followers,
                epoch=command.epoch,
            )
        hosted.epoch = command.epoch
        hosted.peers = command.peers or hosted.peers
        if isinstance(command, PrepareReplica):
            yield from self._life.prepare(hosted, command)
        else:
            yield from self._life.serve(hosted, keep=True)

    def _answer_absent(self, command: Command, replica_id: str) -> Iterator[Effect]:
        """What is not hosted has drained and stopped; it can do nothing else."""
        match command:
            case DrainReplica():
                yield self._announce.drained(replica_id, command.epoch)
            case StopReplica():
                yield self._announce.stopped(replica_id, command.epoch)
            case GrowCache():
                pass  # it has left since
            case _:
                detail = LEAVING if self._roster.leaving else GONE
                yield from self._announce.refused(replica_id, command.epoch, detail)

    def _obey_hosted(self, command: Command, hosted: Hosted, now_s: float) -> Iterator[Effect]:
        match command:
            case DrainReplica():
                late = command.epoch == hosted.serve_epoch and hosted.phase != "draining"
                if not late:
                    hosted.epoch = command.epoch
                    yield from self._life.drain(hosted, now_s + command.timeout_s)
            case StopReplica():
                hosted.epoch = command.epoch
                self.moving.leave_behind(hosted)
                yield from self._life.stop(hosted)
            case ResumeReplica():
                yield from self._resume(hosted, command, now_s)
            case PauseReplica():
                yield from self.moving.pause(hosted, command)
            case TakeRequests():
                yield from self.moving.take(hosted, command)
            case AdvanceStage():
                yield from self.moving.advance(hosted, command)
            case GrowCache():
                yield from self.moving.grow(hosted, command)
            case StartReplica() | PrepareReplica():
                raise AssertionError(command)

    def _resume(self, hosted: Hosted, command: ResumeReplica, now_s: float) -> Iterator[Effect]:
        if not self._roster.leaving:
            hosted.epoch = command.epoch
            yield from self._life.serve(hosted, keep=False)
            return
        yield from self._announce.refused(hosted.replica_id, command.epoch, LEAVING)
        if hosted.phase == "paused":
            yield from self._life.drain(hosted, hosted.drain_deadline_s or now_s)

    def _fault(self, spec: ReplicaSpec, hosted: Hosted | None) -> str:
        """Why this replica cannot be hosted; "" if it can."""
        if self._roster.leaving:
            return LEAVING
        if hosted is not None:
            return "" if hosted.spec == spec else "hosted otherwise: stop it first"
        if len(self._roster.replicas) >= self._replicas_max:
            return f"the worker hosts replicas_max = {self._replicas_max} replicas already"
        return _misfit(spec, self._roster.identity)


def _replica_id(command: Command) -> str:
    if isinstance(command, StartReplica | PrepareReplica):
        return command.replica.replica_id
    return command.replica_id


def _misfit(spec: ReplicaSpec, identity: WorkerIdentity) -> str:
    """Why the replica is not for this worker, or makes no sense; "" if it is and does."""
    if identity.worker_id not in spec.gpus:
        return f"GPU {identity.worker_id} is not among its GPUs {', '.join(spec.gpus)}"
    if spec.model_id not in identity.models:
        return f"model {spec.model_id} is unknown; known: {', '.join(identity.models)}"
    try:
        gpus = Parallelism.parse(spec.parallelism).gpus
    except ConfigInvalid as error:
        return str(error)
    if gpus != len(spec.gpus):
        return f"{spec.parallelism} needs {gpus} GPUs, the plan names {len(spec.gpus)}"
    return ""
