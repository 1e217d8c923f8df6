"""Replicas and the workers that host them: commands, reports, events."""

from typing import Literal

import msgspec

from shared.hardware import GpuSpec
from shared.messages.base import Message
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import Copy
from shared.placement.sheets import ModelShape, Span

ReplicaPhase = Literal[
    "preparing", "prepared", "starting", "serving", "paused", "draining", "failed"
]
"""preparing: memory, rank groups and weights are being made ready beside what runs. prepared: they
are; nothing is admitted until it is started. paused: stands still at a step boundary with all its
requests, and keeps whatever is submitted, until it is resumed or stopped."""


class HostedReplica(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One replica as a worker holds it. ``rank`` 0 leads."""

    replica_id: str
    epoch: int
    phase: ReplicaPhase
    parallelism: str = "tp1pp1"
    rank: int = 0
    detail: str = ""
    model_id: str = ""  # empty: from a worker too old to say
    prepared: int = 0  # epoch of the last PrepareReplica that is done
    taken: int = 0  # epoch of the last TakeRequests that is done and neither started nor given up
    stage: int = 0  # highest AdvanceStage that is done
    fetched_bytes: int = 0  # from elsewhere, by the preparation under way, or the last one
    cache_tokens: int = 0  # tokens of live requests in the KV cache (leader only)
    cache_bytes: int = 0  # of this rank's KV cache, used or not
    cache_bytes_full: int = 0  # what it grows to when the replicas before it have left
    stage_layers: tuple[Span, ...] = ()  # as it was told when it was prepared


class WorkerReport(Message, frozen=True, kw_only=True):
    """A worker's heartbeat: who it is, what it owns, what it hosts."""

    worker_id: str
    incarnation: str
    node_id: str
    gpu: GpuSpec
    models: tuple[str, ...] = ()
    replicas: tuple[HostedReplica, ...] = ()
    leaving: bool = False  # last report of a worker that drains on SIGTERM
    peer: str = ""  # where other workers reach it for weights, KV cache and rank groups
    shapes: tuple[ModelShape, ...] = ()  # of the models whose weights it can move; else reload
    number: int = 0  # of this incarnation's reports, from 1: one that comes late is known by it


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
    """Host this replica (as the rank your GPU has in ``replica.gpus``). Idempotent by epoch.

    Told to a prepared replica, serve: requests taken for this very ``epoch`` go on, those taken
    for another are given up. ``peers``: where the replica's other workers are reached."""

    epoch: int
    worker_id: str
    replica: ReplicaSpec
    peers: dict[str, str] = msgspec.field(default_factory=dict[str, str])


class Shares(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the requests of replicas that go are spread over those that take them:
    ``rows[type][replica_id]`` as in DeploymentPlan.weights, over ``leaders`` only (replica ->
    leading worker). Who asks computes the same answer (shared/placement/spread.py)."""

    rows: dict[str, dict[str, float]] = msgspec.field(default_factory=dict[str, dict[str, float]])
    leaders: dict[str, str] = msgspec.field(default_factory=dict[str, str])


class PrepareReplica(Message, frozen=True, kw_only=True):
    """Make this replica ready to serve, and to take requests over, beside whatever runs now.

    ``copies`` are this worker's; ``sources``: replicas (-> leading worker) whose requests it will
    take by ``shares``, and whose KV cache may be copied ahead. ``peers``: where all workers named
    here are reached. ``cache_bytes_max``: of this rank's KV cache, as long as the old replicas are
    there, 0 as configured. Told to a replica that serves: expect requests. Idempotent by epoch."""

    epoch: int
    worker_id: str
    replica: ReplicaSpec
    peers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    copies: tuple[Copy, ...] = ()
    sources: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    shares: Shares = msgspec.field(default_factory=Shares)
    stages: int = 1  # copies of a stage > 0 wait for AdvanceStage
    stage_layers: tuple[Span, ...] = ()  # freed after each, where there are several; only echoed
    cache_bytes_max: int = 0
    verify: bool = False  # compare checksums of each shard with its source


class PauseReplica(Message, frozen=True, kw_only=True):
    """Stand still at the next step boundary; keep requests and KV cache for who takes them."""

    epoch: int
    worker_id: str
    replica_id: str
    shares: Shares = msgspec.field(default_factory=Shares)


class TakeRequests(Message, frozen=True, kw_only=True):
    """Take over your share of the paused ``sources``' requests with their KV cache, and hold them
    until StartReplica of the same epoch. To leaders only."""

    epoch: int
    worker_id: str
    replica_id: str
    sources: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    peers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    shares: Shares = msgspec.field(default_factory=Shares)


class AdvanceStage(Message, frozen=True, kw_only=True):
    """Where old and new do not fit side by side. To a replica that comes: fetch the copies of
    ``stage``. To one that goes: every copy of the stages before is done, free those layers."""

    epoch: int
    worker_id: str
    replica_id: str
    stage: int
    layers: tuple[int, int] = (0, 0)  # of the weights that the one that goes may free


class GrowCache(Message, frozen=True, kw_only=True):
    """Nothing else is on your GPUs any more: give the KV cache, which was small to fit beside the
    replicas before you, its full size on all ranks. To leaders only. Done, or put off, between two
    steps; the ranks' reports tell."""

    epoch: int
    worker_id: str
    replica_id: str


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
    """The worker's part of the replica is ready to serve. ``pauses``: (seconds, requests) for
    those taken over that go on with their KV cache: from when the old replica stood still to the
    end of the first step here. Those computed anew wait longer, and are not among them."""

    epoch: int
    worker_id: str
    replica_id: str
    pauses: tuple[tuple[float, int], ...] = ()


class ReplicaPrepared(Message, frozen=True, kw_only=True):
    """The worker's part of the replica has its weights. ``bytes_by_source``: worker_id -> bytes,
    its own for what was copied in place, "" for what was read from disk. ``took_s``: seconds in
    which they were copied, alone."""

    epoch: int
    worker_id: str
    replica_id: str
    bytes_by_source: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    took_s: float = 0.0


class ReplicaPaused(Message, frozen=True, kw_only=True):
    epoch: int
    worker_id: str
    replica_id: str
    requests: int = 0


class RequestsTaken(Message, frozen=True, kw_only=True):
    """``moved`` with their KV cache, ``replayed`` without: their tokens are computed again.
    Bytes as in ReplicaPrepared, of the KV cache on all ranks; ``ahead`` of them before the pause.
    ``bytes_needed``: between workers, of the KV cache that moved, each byte once. ``detail``: why
    requests are replayed."""

    epoch: int
    worker_id: str
    replica_id: str
    moved: int = 0
    replayed: int = 0
    bytes_by_source: dict[str, dict[str, int]] = msgspec.field(
        default_factory=dict[str, dict[str, int]]
    )  # target worker -> source worker -> bytes
    ahead_bytes: int = 0
    bytes_needed: int = 0
    took_s: float = 0.0
    detail: str = ""


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
    """The worker could not start the replica, or its engine broke; ``detail`` names the cause.
    ``refused``: it only does not do what a command asks; what it hosts is as it was."""

    epoch: int
    worker_id: str
    replica_id: str
    detail: str
    refused: bool = False
