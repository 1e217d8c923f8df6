"""What the switcher hears: its subjects, its timers, its job, and the key it owns."""

import msgspec

from services.switcher.view import ReplicaEvent
from shared import subjects
from shared.core import Draining, Loaded, Started, StoreConflict, Stored
from shared.hardware import GpuSpec
from shared.messages.base import Message
from shared.messages.plans import AdoptPlan, DeploymentPlan, PlanInForce, ReplicaSpec, StoredPlan
from shared.messages.replicas import WorkerReport
from shared.placement.copies import Copy
from shared.placement.sheets import ModelShape, Span

KEY = "plan"
NOTHING = StoredPlan(epoch=0, in_force=DeploymentPlan(plan_id="none", reason="nothing adopted yet"))
PLAN_TRANSFER = "plan_transfer"  # TransferWanted -> TransferPlanned
INPUTS = (
    subjects.ADOPT_PLAN,
    subjects.PLAN_IN_FORCE,
    subjects.WORKER_REPORT,
    subjects.REPLICA_STARTED,
    subjects.REPLICA_DRAINED,
    subjects.REPLICA_STOPPED,
    subjects.REPLICA_FAILED,
    subjects.REPLICA_PREPARED,
    subjects.REPLICA_PAUSED,
    subjects.REQUESTS_TAKEN,
)


class Tick(Message, frozen=True, kw_only=True):
    """Timer: send again what is unanswered, notice who fell silent, repeat the plan in force."""


class PhaseDeadline(Message, frozen=True, kw_only=True):
    """Timer: the phase ``state`` of the switch to ``epoch`` should have ended; or the stage after
    ``stage`` should have, where weights go over in stages."""

    epoch: int
    state: str
    stage: int = 0


class HeldCache(msgspec.Struct, frozen=True):
    """KV cache on one GPU: its bytes, used or not, and those that live requests use."""

    cache_bytes: int
    used_bytes: int


class RequestMove(msgspec.Struct, frozen=True):
    """Requests with ``tokens`` in the KV cache go from one replica to another."""

    source: str  # replica_id
    target: str
    tokens: int


class TransferWanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the copies of a switch have to be planned for. ``leaving`` and ``staying`` are replicas
    that hold all their weights now; ``dead``: workers that are gone. ``cache_tokens_min``: with
    room for fewer tokens a new replica would not do."""

    epoch: int
    shapes: dict[str, ModelShape]  # by model
    nodes: dict[str, str]  # by worker, as the rest
    gpus: dict[str, GpuSpec]
    leaving: tuple[ReplicaSpec, ...]
    staying: tuple[ReplicaSpec, ...]
    arriving: tuple[ReplicaSpec, ...]
    dead: tuple[str, ...]
    moves: tuple[RequestMove, ...]
    held: dict[str, HeldCache]
    cache_tokens_min: int = 1


class TransferPlanned(Message, frozen=True, kw_only=True):
    """The copies of the switch of ``epoch``: ``copies[worker_id][replica_id]``. ``stages[k]``: the
    layers that replicas that go may free when the copies of stage k are done. ``cache_bytes_max``
    by worker. ``bytes_total``: of all copies of weights between workers and from disks;
    ``bytes_bound``: the least that any plan would copy so.
    ``failure``: why there is no such plan; all else is empty then."""

    epoch: int
    copies: dict[str, dict[str, tuple[Copy, ...]]] = msgspec.field(
        default_factory=dict[str, dict[str, tuple[Copy, ...]]]
    )
    stages: tuple[Span, ...] = ((0, 0),)
    cache_bytes_max: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    bytes_total: int = 0
    bytes_bound: int = 0
    bytes_in_place: int = 0
    notes: tuple[str, ...] = ()
    failure: str = ""
    took_s: float = 0.0


BucketEvent = Loaded | Stored | StoreConflict
SwitcherEvent = (
    Started
    | Draining
    | AdoptPlan
    | PlanInForce
    | WorkerReport
    | ReplicaEvent
    | BucketEvent
    | TransferPlanned
    | Tick
    | PhaseDeadline
)
