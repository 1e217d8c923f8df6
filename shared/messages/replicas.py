"""Replicas and the workers that host them: commands, reports, events."""

from typing import Literal

import msgspec

from shared.hardware import GpuSpec
from shared.messages.base import Message
from shared.messages.plans import ReplicaSpec

ReplicaPhase = Literal["starting", "serving", "draining", "failed"]


class HostedReplica(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One replica as a worker holds it. ``rank`` 0 leads."""

    replica_id: str
    epoch: int
    phase: ReplicaPhase
    parallelism: str = "tp1pp1"
    rank: int = 0
    detail: str = ""
    model_id: str = ""  # empty: from a worker too old to say


class WorkerReport(Message, frozen=True, kw_only=True):
    """A worker's heartbeat: who it is, what it owns, what it hosts."""

    worker_id: str
    incarnation: str
    node_id: str
    gpu: GpuSpec
    models: tuple[str, ...] = ()
    replicas: tuple[HostedReplica, ...] = ()
    leaving: bool = False  # last report of a worker that drains on SIGTERM


class ReplicaReport(Message, frozen=True, kw_only=True):
    """Live load of one replica, from its leader: when it changed, and now and then anyway."""

    replica_id: str
    worker_id: str
    incarnation: str
    epoch: int
    phase: ReplicaPhase
    running: int = 0
    waiting: int = 0
    tokens_pending: int = 0  # prompt tokens not yet prefilled + output tokens still allowed
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    running_max: int = 0
    waiting_max: int = 0
    output_tokens_total: int = 0
    requests_total: int = 0
    step_s: float = 0.0  # exponentially weighted mean of the engine's step time


class StartReplica(Message, frozen=True, kw_only=True):
    """Host this replica (as the rank your GPU has in ``replica.gpus``). Idempotent by epoch."""

    epoch: int
    worker_id: str
    replica: ReplicaSpec


class DrainReplica(Message, frozen=True, kw_only=True):
    """Admit nothing more; finish what runs within ``timeout_s``, hand back the rest."""

    epoch: int
    worker_id: str
    replica_id: str
    timeout_s: float


class StopReplica(Message, frozen=True, kw_only=True):
    """Free the replica's memory now; what still runs is handed back to the ingress."""

    epoch: int
    worker_id: str
    replica_id: str


class ResumeReplica(Message, frozen=True, kw_only=True):
    """Serve again: the switch for which the replica was drained was rolled back."""

    epoch: int
    worker_id: str
    replica_id: str


class ReplicaStarted(Message, frozen=True, kw_only=True):
    """The worker's part of the replica is ready to serve."""

    epoch: int
    worker_id: str
    replica_id: str


class ReplicaDrained(Message, frozen=True, kw_only=True):
    """Nothing runs on the replica any more, and nothing is admitted."""

    epoch: int
    worker_id: str
    replica_id: str
    handed_back: int = 0


class ReplicaStopped(Message, frozen=True, kw_only=True):
    epoch: int
    worker_id: str
    replica_id: str


class ReplicaFailed(Message, frozen=True, kw_only=True):
    """The worker could not start the replica, or its engine broke; ``detail`` names the cause."""

    epoch: int
    worker_id: str
    replica_id: str
    detail: str
