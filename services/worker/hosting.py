"""The life of the replicas that a worker hosts: the half of its core that follows commands.

Each method answers one event with its effects. ``changed`` collects the replicas whose state
others should hear of at once; the core reports and clears it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from services.worker.announce import Announcer
from services.worker.events import (
    ABORT,
    START_ENGINE,
    STOP_ENGINE,
    DrainDeadline,
    EngineAbort,
    EngineBroken,
    EngineReady,
    EngineStart,
    EngineStop,
    EngineStopped,
)  # fmt: skip
from services.worker.identity import WorkerIdentity
from services.worker.replica import Ending, Hosted, Settled
from shared.core import Effect, Log, SetTimer, Start
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import DrainReplica, ResumeReplica, StartReplica, StopReplica

EPOCHS_MAX = 1024  # replicas whose highest epoch is remembered
HANDED_BACK = Ending(finish="failed", failure="draining", detail="handed back: replica drains")


class Hosting:
    def __init__(self, identity: WorkerIdentity, *, settled: Settled, replicas_max: int) -> None:
        self._identity = identity
        self._announce = Announcer(identity.worker_id)
        self._settled = settled
        self._replicas_max = replicas_max
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._generation = 0
        self.replicas: dict[str, Hosted] = {}
        self.changed: set[str] = set()
        self.leaving = False

    def check(self) -> None:
        assert len(self.replicas) <= self._replicas_max
        assert len(self._epochs) <= EPOCHS_MAX
        for replica_id, hosted in self.replicas.items():
            assert replica_id == hosted.spec.replica_id
            assert not self.leaving or hosted.phase != "serving", hosted
            hosted.check()

    def start(self, command: StartReplica) -> Iterable[Effect]:
        spec = command.replica
        if self._outdated(spec.replica_id, command.epoch):
            return
        hosted = self.replicas.get(spec.replica_id)
        if hosted is not None and hosted.engine == "stopping":
            return  # The command is repeated until done: it comes again once this has ended.
        fault = self._fault(spec, hosted)
        if fault:
            yield from self._announce.failed(spec.replica_id, command.epoch, fault)
            return
        if hosted is None:
            hosted = self.replicas[spec.replica_id] = Hosted(
                spec=spec,
                rank=spec.gpus.index(self._identity.worker_id),
                epoch=command.epoch,
                serve_epoch=command.epoch,
            )
        hosted.epoch = command.epoch
        yield from self._serve(hosted)

    def resume(self, command: ResumeReplica) -> Iterable[Effect]:
        if self._outdated(command.replica_id, command.epoch):
            return
        hosted = self.replicas.get(command.replica_id)
        if hosted is not None and hosted.engine == "stopping":
            return
        if hosted is None or self.leaving:
            detail = "the worker is leaving" if self.leaving else "not hosted here any more"
            yield from self._announce.failed(command.replica_id, command.epoch, detail)
            return
        hosted.epoch = command.epoch
        yield from self._serve(hosted)

    def drain(self, command: DrainReplica, now_s: float) -> Iterable[Effect]:
        if self._outdated(command.replica_id, command.epoch):
            return
        hosted = self.replicas.get(command.replica_id)
        if hosted is None:
            yield self._announce.drained(command.replica_id, command.epoch)
            return
        if command.epoch == hosted.serve_epoch and hosted.phase != "draining":
            return
        hosted.epoch = command.epoch
        yield from self._drain(hosted, now_s + command.timeout_s)

    def stop(self, command: StopReplica) -> Iterable[Effect]:
        if self._outdated(command.replica_id, command.epoch):
            return
        hosted = self.replicas.get(command.replica_id)
        if hosted is None:
            yield self._announce.stopped(command.replica_id, command.epoch)
            return
        hosted.epoch = command.epoch
        yield from self._stop(hosted)

    def engine_ready(self, event: EngineReady) -> Iterable[Effect]:
        hosted = self._of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.engine != "starting":
            return
        hosted.engine = "ready"
        self.changed.add(event.replica_id)
        if hosted.phase == "starting":
            hosted.phase = "serving"
            yield self._announce.started(hosted.spec.replica_id, hosted.epoch)

    def engine_broken(self, event: EngineBroken) -> Iterable[Effect]:
        hosted = self._of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.engine == "none":
            return
        if hosted.engine == "stopping":
            yield from self._remove(hosted)
            return
        was_draining = hosted.phase == "draining" and not hosted.drained
        ending = Ending(finish="failed", failure="engine", detail=event.detail)
        lost = len(hosted.live)
        yield from self._end_all(hosted, ending)
        hosted.phase, hosted.engine, hosted.detail = "failed", "none", event.detail
        hosted.drained, hosted.drain_deadline_s, hosted.measured = False, None, None
        yield from self._announce.failed(
            event.replica_id, hosted.epoch, event.detail, requests_lost=lost
        )
        self.changed.add(event.replica_id)
        if was_draining:
            yield self._announce.drained(event.replica_id, hosted.epoch, handed_back=lost)
        if self.leaving:
            yield from self._stop(hosted)

    def engine_stopped(self, event: EngineStopped) -> Iterable[Effect]:
        hosted = self._of_generation(event.replica_id, event.generation)
        if hosted is not None and hosted.engine == "stopping":
            yield from self._remove(hosted)

    def deadline(self, event: DrainDeadline) -> Iterable[Effect]:
        """Hand back what outlived the drain: its ingress resubmits it elsewhere."""
        hosted = self._of_generation(event.replica_id, event.generation)
        if hosted is None or hosted.drain_deadline_s != event.at_s:
            return
        for request in hosted.live.values():
            yield Start(ABORT, EngineAbort(event.replica_id, request.key))
        hosted.handed_back += len(hosted.live)
        yield from self._end_all(hosted, HANDED_BACK)
        yield from self.settle(hosted)

    def leave(self, *, deadline_s: float) -> Iterable[Effect]:
        """The process ends: drain everything, then stop it."""
        self.leaving = True
        self.changed.update(self.replicas)
        for hosted in list(self.replicas.values()):
            if hosted.engine != "stopping":
                yield from self._drain(hosted, deadline_s)

    def settle(self, hosted: Hosted) -> Iterator[Effect]:
        """A draining replica whose last request has ended is drained, once."""
        if hosted.phase != "draining" or hosted.live or hosted.drained:
            return
        hosted.drained, hosted.drain_deadline_s = True, None
        self.changed.add(hosted.spec.replica_id)
        yield self._announce.drained(
            hosted.spec.replica_id, hosted.epoch, handed_back=hosted.handed_back
        )
        if self.leaving:
            yield from self._stop(hosted)

    def _outdated(self, replica_id: str, epoch: int) -> bool:
        seen = self._epochs.get(replica_id, -1)
        if epoch < seen:
            return True
        self._epochs[replica_id] = epoch
        self._epochs.move_to_end(replica_id)
        if len(self._epochs) > EPOCHS_MAX:
            self._epochs.popitem(last=False)
        return False

    def _of_generation(self, replica_id: str, generation: int) -> Hosted | None:
        hosted = self.replicas.get(replica_id)
        return hosted if hosted is not None and hosted.generation == generation else None

    def _fault(self, spec: ReplicaSpec, hosted: Hosted | None) -> str:
        """Why this replica cannot be hosted; "" if it can."""
        if self.leaving:
            return "the worker is leaving"
        if hosted is not None:
            return "" if hosted.spec == spec else "hosted otherwise: stop it first"
        if len(self.replicas) >= self._replicas_max:
            return f"the worker hosts replicas_max = {self._replicas_max} replicas already"
        return _misfit(spec, self._identity)

    def _serve(self, hosted: Hosted) -> Iterator[Effect]:
        """Bring a hosted replica to serving, from whatever phase it is in."""
        hosted.serve_epoch = hosted.epoch
        hosted.drained, hosted.drain_deadline_s, hosted.handed_back = False, None, 0
        self.changed.add(hosted.spec.replica_id)
        if not hosted.leads or hosted.engine == "ready":
            hosted.phase = "serving"
            yield self._announce.started(hosted.spec.replica_id, hosted.epoch)
            return
        hosted.phase = "starting"
        if hosted.engine == "none":
            self._generation += 1
            hosted.generation, hosted.engine, hosted.detail = self._generation, "starting", ""
            hosted.measured = None
            yield Start(START_ENGINE, EngineStart(hosted.spec, hosted.generation))
            yield _log("replica.starting", hosted)

    def _drain(self, hosted: Hosted, deadline_s: float) -> Iterator[Effect]:
        replica_id = hosted.spec.replica_id
        if hosted.drained or hosted.phase == "failed":
            yield self._announce.drained(replica_id, hosted.epoch, handed_back=hosted.handed_back)
            if self.leaving:
                yield from self._stop(hosted)
            return
        if hosted.phase != "draining":
            hosted.phase = "draining"
            self.changed.add(replica_id)
            yield _log("replica.draining", hosted)
        # Commands are repeated: only a deadline earlier than the known one counts.
        known_s = hosted.drain_deadline_s
        if hosted.live and (known_s is None or deadline_s < known_s):
            hosted.drain_deadline_s = deadline_s
            timer = DrainDeadline(
                replica_id=replica_id, generation=hosted.generation, at_s=deadline_s
            )
            yield SetTimer(deadline_s, timer)
        yield from self.settle(hosted)

    def _stop(self, hosted: Hosted) -> Iterator[Effect]:
        if hosted.engine == "stopping":
            return
        yield from self._end_all(hosted, HANDED_BACK)
        if hosted.engine == "none":
            yield from self._remove(hosted)
            return
        self.changed.add(hosted.spec.replica_id)
        hosted.phase, hosted.engine, hosted.measured = "draining", "stopping", None
        hosted.drained, hosted.drain_deadline_s = True, None
        yield Start(STOP_ENGINE, EngineStop(hosted.spec.replica_id, hosted.generation))

    def _remove(self, hosted: Hosted) -> Iterator[Effect]:
        replica_id = hosted.spec.replica_id
        del self.replicas[replica_id]
        self.changed.add(replica_id)
        yield self._announce.stopped(replica_id, hosted.epoch)
        yield _log("replica.stopped", hosted)

    def _end_all(self, hosted: Hosted, ending: Ending) -> Iterator[Effect]:
        live = list(hosted.live.values())
        for request in live:
            self._settled.add(request.request_id, request.attempt)
        hosted.live.clear()
        hosted.ingresses.clear()
        yield from self._identity.endings(live, ending, replica_id=hosted.spec.replica_id)


def _log(event: str, hosted: Hosted) -> Log:
    return Log(event, {"replica_id": hosted.spec.replica_id, "epoch": hosted.epoch})


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
