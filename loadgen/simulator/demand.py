"""How busy a demand would keep a replica, as a fluid: no queues, no bursts, full batches.

For each type, a batch as large as the KV cache and the batch scheduler allow decodes at the
engine's own step times, and its prompts are prefilled in full steps. What a second of the demand
takes in seconds of one replica is its load; a static split is pre-screened by it, and simulated
after that.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.worker.engine.batching_types import PrefillWork
from services.worker.engine.modelled_timing import ModelledReplica
from shared.cost.step import PS_PER_S, pairs


@dataclass(frozen=True, slots=True)
class Demand:
    """One type of one model's requests; lengths are means."""

    model_id: str
    rps: float
    input_tokens: float
    output_tokens: float


def busy(replica: ModelledReplica, demand: Iterable[Demand]) -> float:
    """Replicas that ``demand``, all of one model, would fill."""
    return sum(kind.rps * _request_s(replica, kind) for kind in demand)


def _request_s(replica: ModelledReplica, kind: Demand) -> float:
    """What one request takes of the replica's time, as one of a full batch; infinite where not
    even one has room."""
    limits = replica.limits
    tokens = kind.input_tokens + kind.output_tokens
    fitting = int(replica.kv_blocks * limits.block_tokens / max(1.0, tokens))
    batch = min(limits.running_max, fitting)
    if batch < 1:
        return float("inf")
    times = replica.times.decode(batch)
    context = batch * (kind.input_tokens + kind.output_tokens / 2.0)
    decode_ps = kind.output_tokens * (times.fixed_ps + times.slope_ps * context) / batch
    return (decode_ps + _prefill_ps(replica, round(kind.input_tokens))) / PS_PER_S


def _prefill_ps(replica: ModelledReplica, tokens: int) -> float:
    """A prompt's part in steps that are full of prompts like it."""
    budget = replica.limits.batch_tokens_max
    if tokens >= budget:
        chunk = PrefillWork(budget, 1, pairs(tokens // 2, budget), 0, tokens // 2)
        return replica.times.step_ps(0, 0, chunk) * tokens / budget
    count = max(1, budget // max(1, tokens))
    whole = PrefillWork(count * tokens, count, count * pairs(0, tokens), count, count * tokens)
    return replica.times.step_ps(0, 0, whole) / count
