"""What has to be known of workers and replicas before the copies of a switch can be planned. Pure.

A switcher started anew asks the same question again. What may have changed by then is how many
tokens are in the KV cache; ranks that are prepared keep the copies that they were told.
"""

from collections.abc import Iterable

from services.switcher.capacity import ranks
from services.switcher.differences import leaving, staying
from services.switcher.events import HeldCache, RequestMove, TransferWanted
from services.switcher.live import STANDS_OR_RUNS, Live
from shared.messages.plans import ReplicaSpec
from shared.placement.spread import ANY_TYPE

NOT_YET = frozenset({"starting", "preparing", "failed"})
"""Phases in which a rank does not know the size of its KV cache."""


def wanted(live: Live) -> TransferWanted | str:
    """The question; or, in words, what it waits for: workers that it needs have neither reported
    nor fallen silent, or do not say yet how much memory they use."""
    switch, view = live.switch, live.view
    models = {spec.model_id for spec in live.targets}
    gone = [s for s in leaving(switch.origin, switch.target) if s.model_id in models]
    kept = [s for s in staying(switch.origin, switch.target) if s.model_id in models]
    workers = sorted({gpu for spec in (*gone, *kept, *live.arriving) for gpu in spec.gpus})
    if silent := [w for w in workers if not view.reported(w) and not live.gone(w)]:
        return f"a report of {', '.join(silent)}"
    shapes = {
        model_id: shape
        for worker_id in workers
        for model_id in sorted(models)
        if (shape := view.shape(worker_id, model_id))
    }
    going = tuple(spec for spec in gone if _whole(live, spec))
    stays = tuple(spec for spec in kept if _whole(live, spec))
    if unknown := [s.replica_id for s in (*going, *stays) if _cache_unknown(live, s)]:
        return f"the size of the KV cache of {', '.join(unknown)}"
    return TransferWanted(
        epoch=switch.epoch,
        shapes=shapes,
        nodes={w: view.node(w) for w in workers},
        gpus={w: view.gpu(w) for w in workers},
        leaving=going,
        staying=stays,
        arriving=live.arriving,
        dead=tuple(w for w in workers if live.gone(w)),
        moves=tuple(_moves(live, going)),
        held=_held(live, (*going, *stays)),
        cache_tokens_min=max(1, min(live.cache_tokens_min, _capacity(live, (*going, *stays)))),
    )


def _whole(live: Live, spec: ReplicaSpec) -> bool:
    """Whether all its ranks are there, with their weights."""
    return all(
        not live.gone(worker_id)
        and (held := live.view.held((worker_id, spec.replica_id))) is not None
        and held.phase in STANDS_OR_RUNS
        for worker_id in spec.gpus
    )


def _cache_unknown(live: Live, spec: ReplicaSpec) -> bool:
    """Whether what it holds of a limited memory is not known yet: we heard that it was started,
    and no report since. Taken for nothing, it would be planned over. An engine that has no memory
    of its own, as a modelled one, reports none for good."""
    view = live.view
    return any(
        view.gpu(worker_id).memory_bytes
        and not held.cache_bytes
        and (
            (told := view.in_report((worker_id, spec.replica_id))) is None or told.phase in NOT_YET
        )
        for worker_id, held, _ in ranks(live, spec)
    )


def _moves(live: Live, going: tuple[ReplicaSpec, ...]) -> Iterable[RequestMove]:
    """Tokens are spread over takers as their weights are on the whole: what type each request is
    of is for the workers to know."""
    for takeover in live.takeovers:
        row = takeover.shares.rows[ANY_TYPE]
        for source in takeover.sources:
            held = live.leader(source)
            if held is None or source not in going:
                continue
            for taker in takeover.takers:
                tokens = round(held.cache_tokens * row.get(taker.replica_id, 0.0))
                yield RequestMove(source.replica_id, taker.replica_id, tokens)


def _capacity(live: Live, specs: Iterable[ReplicaSpec]) -> int:
    """Tokens that the smallest of the replicas has KV cache for; 0 if nobody says. A new replica
    needs no more to begin with. What its requests need now, and a share more, the planner counts
    by itself; when the old replicas have left it grows."""
    found = [
        held.cache_bytes // token_bytes
        for spec in specs
        for _, held, token_bytes in ranks(live, spec)
        if held.cache_bytes and token_bytes
    ]
    return min(found, default=0)


def _held(live: Live, specs: Iterable[ReplicaSpec]) -> dict[str, HeldCache]:
    found: dict[str, HeldCache] = {}
    for spec in specs:
        leader = live.leader(spec)
        tokens = leader.cache_tokens if leader else 0
        for worker_id, held, token_bytes in ranks(live, spec):
            used = tokens * token_bytes
            # One that is small may be growing: it has been told to, and its report is older.
            most = max(held.cache_bytes, held.cache_bytes_full)
            before = found.get(worker_id, HeldCache(0, 0))
            found[worker_id] = HeldCache(
                before.cache_bytes + most, before.used_bytes + min(used, most or used)
            )
    return found
