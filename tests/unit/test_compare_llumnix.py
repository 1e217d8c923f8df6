"""Llumnix's migration, one look at a time."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.simulator.llumnix import (
    PAUSE_S,
    REMAINING_TOKENS_MIN,
    ReplicaView,
    migrations,
)


def view(
    name: str,
    requests: Sequence[tuple[str, int]],
    *,
    kv_free: int,
    waiting: int = 0,
    kv_waiting: int = 0,
    busy: bool = False,
) -> ReplicaView:
    return ReplicaView(
        replica_id=name,
        running=len(requests),
        waiting=waiting,
        kv_free=kv_free,
        kv_waiting=kv_waiting,
        requests=requests,
        busy=busy,
    )


FULL = view("full", [("long", 900), ("short", 80), ("mid", 300)], kv_free=10)
EMPTY = view("empty", [], kv_free=5000)


def test_the_shortest_request_leaves_the_full_replica() -> None:
    """It would preempt and recompute while its neighbour stands idle."""
    (move,) = migrations([EMPTY, FULL], 3.0)
    assert (move.key, move.from_id, move.to_id) == ("short", "full", "empty")
    assert (move.kv_tokens, move.pause_s, move.decided_s) == (80, PAUSE_S, 3.0)


def test_nobody_moves_while_all_have_room() -> None:
    """Requests would wander between replicas for nothing."""
    assert migrations([view("a", [("x", 100)], kv_free=REMAINING_TOKENS_MIN), EMPTY], 0.0) == []


def test_waiting_requests_count_as_taken_room() -> None:
    """A replica with a queue would be sent more."""
    queued = view("queued", [("x", 500)], kv_free=1000, waiting=1, kv_waiting=950)
    assert [move.from_id for move in migrations([queued, EMPTY], 0.0)] == ["queued"]
    assert migrations([FULL, queued], 0.0) == []


def test_neediest_meets_freest_and_each_takes_part_once() -> None:
    """All givers would pour into one replica, which then becomes the full one."""
    worse = view("worse", [("w", 60)] * 1 + [("v", 700)], kv_free=0, waiting=2, kv_waiting=400)
    half = view("half", [("h", 100)], kv_free=2000)
    moves = migrations([half, FULL, EMPTY, worse], 0.0)
    assert [(m.from_id, m.to_id) for m in moves] == [("worse", "empty"), ("full", "half")]


def test_a_taker_does_not_become_a_giver() -> None:
    """The same request would be sent to and fro."""
    tight = view("tight", [("t", 100)], kv_free=REMAINING_TOKENS_MIN + 20)
    assert migrations([FULL, tight], 0.0) == []


@pytest.mark.parametrize("busy", ["full", "empty"])
def test_one_migration_at_a_time(busy: str) -> None:
    """Two copies would share a link that is modelled for one."""
    loads = [
        view("full", FULL.requests, kv_free=10, busy=busy == "full"),
        view("empty", [], kv_free=5000, busy=busy == "empty"),
    ]
    assert migrations(loads, 0.0) == []


def test_order_of_replicas_does_not_matter() -> None:
    """A seed would not replay."""
    loads = [
        FULL,
        EMPTY,
        view("half", [("h", 100)], kv_free=2000),
        view("b", [("q", 5)], kv_free=3),
    ]
    assert migrations(loads, 1.0) == migrations(loads[::-1], 1.0)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 2000), max_size=6),
            st.integers(0, 5000),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_whatever_the_loads(drawn: list[tuple[list[int], int, int, bool]]) -> None:
    """A request would be sent twice, to its own replica, or to one without room for it."""
    loads = {
        f"r{i}": view(
            f"r{i}",
            [(f"r{i}-{n}", tokens) for n, tokens in enumerate(held)],
            kv_free=free, waiting=waiting, kv_waiting=50 * waiting, busy=busy,
        )
        for i, (held, free, waiting, busy) in enumerate(drawn)
    }  # fmt: skip
    moves = migrations(list(loads.values()), 0.0)
    ends = [end for move in moves for end in (move.from_id, move.to_id)]
    assert len(ends) == len(set(ends))
    for move in moves:
        giver, taker = loads[move.from_id], loads[move.to_id]
        assert not giver.busy
        assert not taker.busy
        assert (move.key, move.kv_tokens) in giver.requests
        assert move.kv_tokens == min(tokens for _, tokens in giver.requests)
        assert giver.remaining_tokens < REMAINING_TOKENS_MIN
        left = taker.kv_free - taker.kv_waiting - move.kv_tokens
        assert left >= REMAINING_TOKENS_MIN * (taker.running + taker.waiting + 1)
