"""For how many tokens the replicas of a switch have KV cache, as their ranks report it. Pure."""

from collections.abc import Iterable

from services.switcher.live import Live
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import HostedReplica
from shared.placement.sheets import Rank, cache_token_bytes


def ranks(live: Live, spec: ReplicaSpec) -> Iterable[tuple[str, HostedReplica, int]]:
    """Each rank's worker, what it says of it, and the bytes of one token in its KV cache."""
    shape = Parallelism.parse(spec.parallelism)
    for number, worker_id in enumerate(spec.gpus):
        held = live.view.held((worker_id, spec.replica_id))
        model = live.view.shape(worker_id, spec.model_id)
        if held is not None and model is not None:
            yield worker_id, held, cache_token_bytes(model, Rank.of(number, shape))


def shortfalls(live: Live) -> Iterable[str]:
    """Takers whose KV cache, grown, holds fewer tokens than that of a replica whose requests they
    take: one request may be longer than that, and could then go on nowhere."""
    for takeover in live.takeovers:
        had = {spec.replica_id: tokens_full(live, spec) for spec in takeover.sources}
        largest = max(had, key=lambda replica_id: had[replica_id])
        for spec in takeover.takers:
            tokens = tokens_full(live, spec)
            if 0 < tokens < had[largest]:
                yield (
                    f"{spec.replica_id} has KV cache for {tokens} tokens, {largest} had it for"
                    f" {had[largest]}: a request longer than that fails when it is to go on"
                )


def tokens_full(live: Live, spec: ReplicaSpec) -> int:
    """Of the rank with the least, when its cache has grown; 0 while a rank has not said."""
    found = [
        max(held.cache_bytes, held.cache_bytes_full) // token_bytes
        for _, held, token_bytes in ranks(live, spec)
        if token_bytes
    ]
    return min(found) if len(found) == len(spec.gpus) else 0
