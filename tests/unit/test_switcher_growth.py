"""A replica whose KV cache had to fit beside old ones is told to grow when they have left."""

import msgspec

from services.switcher.config import SwitcherConfig
from shared.messages.replicas import HostedReplica
from tests.unit.switcher_runs import SHAPE, A, B, Run, hosted, plan, replica

PAIR = plan("PAIR", replica("r2", "g0", "g1"))
TOKEN_BYTES = SHAPE.layers * SHAPE.kv_heads * 2 * SHAPE.head_dim * SHAPE.item_bytes


def small(held: HostedReplica, *, now: int = 1, full: int = 2) -> HostedReplica:
    return msgspec.structs.replace(held, cache_bytes=now, cache_bytes_full=full)


def test_a_small_cache_grows_until_all_ranks_say_so() -> None:
    """Otherwise the replica would serve with what was left beside the old ones for good."""
    run = Run().in_force(PAIR, 3)
    run.report("g0", small(hosted("r2", 3, tp=2), now=2))
    run.report("g1", small(hosted("r2", 3, rank=1, tp=2)))
    run.later()
    assert run.commands == ["grow r2@g0 e3"], "its leader has all ranks grow"
    run.report("g1", small(hosted("r2", 3, rank=1, tp=2), now=2))
    run.later()
    assert run.commands == []


def test_nothing_grows_beside_others_or_half_a_replica() -> None:
    """Otherwise a GPU would be told to hold more than it can, or a replica that is not there."""
    run = Run().in_force(PAIR, 3)
    grown = small(hosted("r2", 3, tp=2))
    run.report("g0", grown, hosted("r0", 2, "draining"))
    run.report("g1", small(hosted("r2", 3, rank=1, tp=2)))
    run.later()
    assert "grow r2@g0 e3" not in run.commands, "the old replica is still there"
    for _ in range(5):
        run.report("g0", msgspec.structs.replace(grown, phase="prepared"))
        run.later()
        assert "grow r2@g0 e3" not in run.commands
    run.report("g0", grown)
    run.later()
    assert "grow r2@g0 e3" not in run.commands, "g1 is gone"


def test_nothing_grows_during_a_switch() -> None:
    """Its memory is given to the replicas that come."""
    run = Run(live=True).in_force(A, 1, "g1")
    run.adopt(B, 1)
    run.write()
    run.report("g0", small(hosted("r0", 1)))
    run.later()
    assert run.commands == []


def test_a_cache_that_may_be_growing_counts_in_full() -> None:
    """A report may be older than the order to grow: what is planned beside it would not fit."""
    run = Run(live=True).in_force(A, 1, "g1")
    run.report("g0", small(hosted("r0", 1)))
    run.adopt(B, 1)
    run.write()
    assert run.questions[0].held["g0"].cache_bytes == 2


def test_a_new_replica_may_begin_with_little() -> None:
    """A GPU that KV cache fills would else never be switched live: there is no room for a second
    cache as large."""
    run = Run(SwitcherConfig(cache_tokens_min=500), live=True).in_force(A, 1, "g1")
    run.report("g0", small(hosted("r0", 1), now=1000 * TOKEN_BYTES, full=1000 * TOKEN_BYTES))
    run.adopt(B, 1)
    run.write()
    assert run.questions[0].cache_tokens_min == 500
