"""Where simulated engines come from, and what they make."""

import dataclasses
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadgen.simulator.memory import Memory
from services.worker.engine.batching import Batch
from services.worker.engine.modelled_timing import replica_by_settings
from shared.cost.limits import EngineLimits
from shared.mesh import ModelledEngineSettings
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SubmitRequest
from shared.placement.sheets import ModelShape


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine finds out about a request only by running it."""

    output_tokens: int
    hashes: Sequence[int] = ()
    hash_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFaults:
    """Chances that an engine cannot start, neither starts nor fails, breaks in a step, or cannot
    take over the requests of another."""

    start_fails: float = 0.0
    start_hangs: float = 0.0
    step_breaks: float = 0.0
    take_fails: float = 0.0


NO_FAULTS = EngineFaults()


class Workshop(Protocol):
    """Where engines come from, and what they make."""

    limits: EngineLimits
    streaming: bool
    followers: bool  # ranks other than the leading one have a part of the engine, too
    faults: EngineFaults

    def batch(self, spec: ReplicaSpec, *, rank: int, cache_bytes_max: int) -> Batch: ...
    def start_s(self, spec: ReplicaSpec) -> float: ...
    def memory(self, model_id: str) -> Memory: ...

    def prepare_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        """To make a rank ready whose weights come from these workers, DISK among them."""
        ...

    def copy_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        """To fetch so many bytes from each of these workers."""
        ...

    def facts(self, request: SubmitRequest) -> Facts: ...
    def tokens(self, request_id: str, position: int, count: int) -> list[int]: ...


def token_at(request_id: str, position: int) -> int:
    """The one right token of a request at a position, whichever replica makes it: so that a client
    can tell a lost, repeated or foreign token from the right one."""
    return zlib.crc32(f"{request_id}/{position}".encode()) % 50_000


SMALL = ModelledEngineSettings(
    base_s=0.05, block_tokens=4, kv_blocks=24, batch_tokens_max=8, running_max=6, waiting_max=64
)
"""So small that a few requests wait, are prefilled in chunks, and push each other out."""
SMALL_SHAPE = ModelShape(
    model_id="simulated",
    layers=4,
    hidden=12,
    intermediate=18,
    heads=6,
    kv_heads=2,
    head_dim=2,
    vocabulary=30,
    item_bytes=2,
)
COPY_S_MAX = 0.5


class SmallWorkshop:
    """Small engines that say each token at once, and start and copy when they like."""

    streaming = followers = True

    def __init__(self, rng: random.Random, faults: EngineFaults) -> None:
        self.faults = faults
        self._rng = rng
        self._memory = Memory(SMALL_SHAPE)
        self.limits = replica_by_settings(SMALL, gpus=1).limits

    def batch(self, spec: ReplicaSpec, *, rank: int, cache_bytes_max: int) -> Batch:
        blocks = SMALL.kv_blocks
        if cache_bytes_max:
            block_bytes = SMALL.block_tokens * self._memory.token(spec, rank)
            blocks = max(1, min(blocks, cache_bytes_max // block_bytes))
        replica = replica_by_settings(SMALL, gpus=1)
        small = dataclasses.replace(replica, kv_blocks=blocks, kv_blocks_full=SMALL.kv_blocks)
        return small.new_batch()

    def start_s(self, spec: ReplicaSpec) -> float:
        del spec
        return 0.5 * self._rng.random()

    def memory(self, model_id: str) -> Memory:
        del model_id
        return self._memory

    def prepare_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        return self.copy_s(worker_id, byte_counts)

    def copy_s(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        del worker_id
        return COPY_S_MAX * self._rng.random() if any(byte_counts.values()) else 0.0

    def facts(self, request: SubmitRequest) -> Facts:
        return Facts(request.sampling.output_tokens_max)

    def tokens(self, request_id: str, position: int, count: int) -> list[int]:
        return [token_at(request_id, position + i) for i in range(count)]
