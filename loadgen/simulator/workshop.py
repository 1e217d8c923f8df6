"""Where simulated engines come from, and what they make."""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.worker.engine.batching import Batch
from services.worker.engine.modelled_timing import replica_by_settings
from shared.cost.limits import EngineLimits
from shared.mesh import ModelledEngineSettings
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SubmitRequest


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine finds out about a request only by running it."""

    output_tokens: int
    hashes: Sequence[int] = ()
    hash_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFaults:
    """Chances that an engine cannot start, neither starts nor fails, breaks in a step."""

    start_fails: float = 0.0
    start_hangs: float = 0.0
    step_breaks: float = 0.0


NO_FAULTS = EngineFaults()


class Workshop(Protocol):
    """Where engines come from, and what they make."""

    limits: EngineLimits
    streaming: bool
    faults: EngineFaults

    def batch(self, spec: ReplicaSpec) -> Batch: ...
    def start_s(self, spec: ReplicaSpec) -> float: ...
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


class SmallWorkshop:
    """Small engines that say each token at once, and start when they like."""

    streaming = True

    def __init__(self, rng: random.Random, faults: EngineFaults) -> None:
        self.faults = faults
        self._rng = rng
        self._replica = replica_by_settings(SMALL, gpus=1)
        self.limits = self._replica.limits

    def batch(self, spec: ReplicaSpec) -> Batch:
        del spec
        return self._replica.new_batch()

    def start_s(self, spec: ReplicaSpec) -> float:
        del spec
        return 0.5 * self._rng.random()

    def facts(self, request: SubmitRequest) -> Facts:
        return Facts(request.sampling.output_tokens_max)

    def tokens(self, request_id: str, position: int, count: int) -> list[int]:
        return [token_at(request_id, position + i) for i in range(count)]
