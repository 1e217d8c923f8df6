"""A switcher under test, with a bucket and a clock that the test moves."""

from typing import TypeVar

from services.switcher.commands import Command, part_of
from services.switcher.config import SwitcherConfig
from services.switcher.core import Switcher
from services.switcher.events import (
    PLAN_TRANSFER,
    PhaseDeadline,
    Tick,
    TransferPlanned,
    TransferWanted,
)
from shared.core import (
    Effect,
    Load,
    Loaded,
    Log,
    Publish,
    SetTimer,
    Start,
    Started,
    Store,
    StoreConflict,
    Stored,
)
from shared.hardware import GpuSpec
from shared.messages.base import Message
from shared.messages.plans import AdoptPlan, DeploymentPlan, ReplicaSpec, StoredPlan
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    GrowCache,
    HostedReplica,
    PauseReplica,
    PrepareReplica,
    ReplicaDrained,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPhase,
    ReplicaPrepared,
    ReplicaStarted,
    ReplicaStopped,
    RequestsTaken,
    ResumeReplica,
    StartReplica,
    StopReplica,
    TakeRequests,
    WorkerReport,
)
from shared.placement.sheets import ModelShape

M = TypeVar("M", bound=Message)
CONFIG = SwitcherConfig()
VERBS: dict[type[Command], str] = {
    StartReplica: "start",
    DrainReplica: "drain",
    StopReplica: "stop",
    ResumeReplica: "resume",
    PrepareReplica: "prepare",
    PauseReplica: "pause",
    TakeRequests: "take",
    AdvanceStage: "stage",
    GrowCache: "grow",
}
SHAPE = ModelShape(
    model_id="m", layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16,
    vocabulary=100, item_bytes=2,
)  # fmt: skip


def replica(replica_id: str, *gpus: str) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id, model_id="m", parallelism=f"tp{len(gpus)}pp1", gpus=gpus
    )


def plan(plan_id: str, *replicas: ReplicaSpec) -> DeploymentPlan:
    row = {spec.replica_id: 1.0 / len(replicas) for spec in replicas}
    return DeploymentPlan(plan_id=plan_id, replicas=replicas, weights={"*": row} if row else {})


def hosted(
    replica_id: str, epoch: int, phase: ReplicaPhase = "serving", *, rank: int = 0, tp: int = 1
) -> HostedReplica:
    return HostedReplica(
        replica_id=replica_id, epoch=epoch, phase=phase, parallelism=f"tp{tp}pp1", rank=rank
    )


A = plan("A", replica("r0", "g0"))
B = plan("B", replica("r1", "g1"))


class Run:
    """Events are handed in with the names of their workers; commands come back as short texts:
    ``drain r0@g0 e2`` is DrainReplica of r0 on g0 under epoch 2. Workers of a ``live`` run can
    move the weights of model m."""

    def __init__(self, config: SwitcherConfig = CONFIG, *, live: bool = False) -> None:
        self.core = Switcher(config)
        self.live = live
        self.now_s = 10.0
        self.effects: list[Effect] = []
        self.bucket: StoredPlan | None = None
        self.revision = 0
        self.epochs: dict[str, int] = {}
        self.step(Started())

    def step(self, event: Message) -> list[Effect]:
        self.effects = self.core.step(event, self.now_s)  # type: ignore[arg-type]  # any of its events
        self.core.check()
        return self.effects

    def loaded(self, stored: StoredPlan | None = None) -> list[Effect]:
        """The bucket answers a Load."""
        if stored is not None:
            self.bucket, self.revision = stored, self.revision + 1
        return self.step(Loaded(key="plan", message=self.bucket, revision=self.revision))

    def write(self) -> list[Effect]:
        """The bucket performs the Store among the last effects."""
        (store,) = [effect for effect in self.effects if isinstance(effect, Store)]
        assert isinstance(store.message, StoredPlan)
        if store.revision != self.revision:
            return self.step(StoreConflict(key="plan"))
        self.bucket, self.revision = store.message, self.revision + 1
        return self.step(Stored(key="plan", revision=self.revision))

    def settled(self, *workers: str) -> "Run":
        """An empty bucket, and workers that hold nothing."""
        self.loaded()
        self.write()
        for worker_id in workers:
            self.report(worker_id)
        return self

    def in_force(self, adopted: DeploymentPlan, epoch: int, *idle: str) -> "Run":
        """``adopted`` is in force and served; ``idle`` workers hold nothing."""
        self.loaded(StoredPlan(epoch=epoch, in_force=adopted, target_epoch=epoch))
        for spec in adopted.replicas:
            for rank, gpu in enumerate(spec.gpus):
                self.report(gpu, hosted(spec.replica_id, epoch, rank=rank, tp=len(spec.gpus)))
        for worker_id in idle:
            self.report(worker_id)
        return self

    def adopt(self, wanted: DeploymentPlan, epoch: int) -> list[Effect]:
        return self.step(AdoptPlan(plan=wanted, based_on_epoch=epoch))

    def report(
        self,
        worker_id: str,
        *held: HostedReplica,
        incarnation: str = "i1",
        leaving: bool = False,
        number: int = 0,
        memory_bytes: int = 0,
    ) -> list[Effect]:
        return self.step(
            WorkerReport(
                worker_id=worker_id,
                incarnation=incarnation,
                node_id="n0",
                gpu=GpuSpec(gpu_id=worker_id, memory_bytes=memory_bytes),
                models=("m",),
                replicas=held,
                leaving=leaving,
                peer=f"tcp://{worker_id}" if self.live else "",
                shapes=(SHAPE,) if self.live else (),
                number=number,
            )
        )

    def drained(self, part: str, epoch: int) -> list[Effect]:
        replica_id, worker_id = part.split("@")
        event = ReplicaDrained(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        return self.step(event)

    def stopped(self, part: str, epoch: int) -> list[Effect]:
        replica_id, worker_id = part.split("@")
        event = ReplicaStopped(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        return self.step(event)

    def started(self, part: str, epoch: int) -> list[Effect]:
        replica_id, worker_id = part.split("@")
        event = ReplicaStarted(epoch=epoch, worker_id=worker_id, replica_id=replica_id)
        return self.step(event)

    def prepared(self, part: str, epoch: int, **sources: int) -> list[Effect]:
        """``sources``: bytes by worker."""
        replica_id, worker_id = part.split("@")
        return self.step(
            ReplicaPrepared(
                epoch=epoch, worker_id=worker_id, replica_id=replica_id, bytes_by_source=sources
            )
        )

    def paused(self, part: str, epoch: int) -> list[Effect]:
        replica_id, worker_id = part.split("@")
        return self.step(ReplicaPaused(epoch=epoch, worker_id=worker_id, replica_id=replica_id))

    def taken(self, part: str, epoch: int) -> list[Effect]:
        replica_id, worker_id = part.split("@")
        return self.step(RequestsTaken(epoch=epoch, worker_id=worker_id, replica_id=replica_id))

    def planned(self, planned: TransferPlanned | None = None) -> list[Effect]:
        """The planner of copies answers the question among the last effects."""
        (wanted,) = self.questions
        return self.step(planned or TransferPlanned(epoch=wanted.epoch))

    @property
    def questions(self) -> list[TransferWanted]:
        """What the planner of copies is asked by the last effects."""
        started = [effect for effect in self.effects if isinstance(effect, Start)]
        assert all(effect.job == PLAN_TRANSFER for effect in started)
        return [effect.argument for effect in started]

    def failed(self, part: str, epoch: int, detail: str = "no memory") -> list[Effect]:
        replica_id, worker_id = part.split("@")
        return self.step(
            ReplicaFailed(epoch=epoch, worker_id=worker_id, replica_id=replica_id, detail=detail)
        )

    def later(self, seconds: float = 0.5) -> list[Effect]:
        """Time passes, then the periodic timer fires."""
        self.now_s += seconds
        return self.step(Tick())

    def deadline(self, state: str, epoch: int) -> list[Effect]:
        return self.step(PhaseDeadline(epoch=epoch, state=state))

    @property
    def commands(self) -> list[str]:
        """The commands among the last effects."""
        return [text for e in self.effects if isinstance(e, Publish) and (text := _short(e))]

    @property
    def deadlines(self) -> list[tuple[str, float]]:
        """The phase deadlines set by the last effects, in seconds from now."""
        return [
            (effect.event.state, effect.at_s - self.now_s)
            for effect in self.effects
            if isinstance(effect, SetTimer) and isinstance(effect.event, PhaseDeadline)
        ]

    @property
    def loads(self) -> int:
        return sum(isinstance(effect, Load) for effect in self.effects)

    def said(self, kind: type[M]) -> list[M]:
        return [
            e.message
            for e in self.effects
            if isinstance(e, Publish) and isinstance(e.message, kind)
        ]

    def logged(self) -> list[str]:
        return [effect.event for effect in self.effects if isinstance(effect, Log)]


def _short(effect: Publish) -> str:
    message = effect.message
    if not isinstance(message, Command):
        return ""
    worker_id, replica_id = part_of(message)
    verb, more = VERBS[type(message)], ""
    if isinstance(message, AdvanceStage):
        verb = f"{verb} {message.stage}"
    if isinstance(message, TakeRequests):
        more = f" of {','.join(sorted(message.sources))}"
    return f"{verb} {replica_id}@{worker_id} e{message.epoch}{more}"
