"""Dispatches that keep long prompts apart: who serves what, and that nobody is left out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.policies.capacity import Column, Table, build
from services.scheduler.policies.capacity_plan import Placed, place_counts, weights
from services.scheduler.policies.separation import (
    LONG,
    Dispatch,
    apart,
    as_weighted,
    deal,
    together,
    ungrouped,
    widened,
)
from shared.hardware import Parallelism
from tests.unit.joint_cases import EMPTY, MadeUpRates, offers, problem

MODEL = "llama-2-70b"
CHAT, CODE = (4.0, 300.0, 200.0), (2.0, 4000.0, 20.0)


def a_table(*types: tuple[float, float, float], gpus: int = 16) -> Table:
    return build(problem({MODEL: types}, offers(gpus)), MadeUpRates())


def counts_of(table: Table, shapes: Mapping[str, int]) -> Counter[Column]:
    (pool,) = table.pools
    return Counter({Column(MODEL, pool, Parallelism.parse(s)): n for s, n in shapes.items()})


def parted(table: Table, shapes: Mapping[str, int]) -> list[Dispatch]:
    """All splits, strictly apart."""
    return [each.strict for each in apart(together(table, counts_of(table, shapes)), MODEL)]


def served_by(dispatch: Dispatch, j: int) -> set[int]:
    """Groups of the replicas that type ``j`` is sent to."""
    rows = np.flatnonzero(dispatch.shares[:, j])
    return {dispatch.table.columns[int(s)].group for s in rows}


def test_long_prompts_get_replicas_of_their_own() -> None:
    """Whoever decodes would wait for them in every burst."""
    table = a_table(CHAT, CODE)
    found = parted(table, {"tp4": 4})
    assert len(found) > 1, "the even split and its neighbours"
    for dispatch in found:
        assert served_by(dispatch, 0) == {0}
        assert served_by(dispatch, 1) == {LONG}
        assert dispatch.shares.sum(axis=0) == pytest.approx(1.0)
        assert "prompts over 1095 tokens on " in dispatch.words
        assert sum(ungrouped(dispatch.counts).values()) == 4


def test_queues_have_a_way_out() -> None:
    """A part that is given too few replicas would wait beside idle ones."""
    table = a_table(CHAT, CODE)
    for split in apart(together(table, counts_of(table, {"tp4": 4})), MODEL):
        assert (served_by(split.one_way, 0), served_by(split.one_way, 1)) == ({0, LONG}, {LONG})
        assert (served_by(split.both_ways, 0), served_by(split.both_ways, 1)) == (
            {0, LONG},
            {0, LONG},
        )
        for dispatch in (split.one_way, split.both_ways):
            assert dispatch.shares.sum(axis=0) == pytest.approx(1.0)


def test_prompts_that_are_alike_are_not_parted() -> None:
    """A router sees the prompt only: it would send at random."""
    table = a_table((4.0, 300.0, 200.0), (2.0, 330.0, 900.0))
    assert not parted(table, {"tp4": 4})


def test_one_replica_serves_all() -> None:
    """There is nothing to part."""
    table = a_table(CHAT, CODE)
    assert not parted(table, {"tp8": 1})


def test_the_even_split_follows_the_work() -> None:
    """A part with too few replicas would be late in calm, too."""
    little, much = (4.0, 300.0, 200.0), (20.0, 4000.0, 20.0)
    table = a_table(little, much, gpus=32)
    tried = {
        sum(n for c, n in d.counts.items() if c.group == LONG) for d in parted(table, {"tp4": 8})
    }
    assert min(tried) > 4, "most of the work is in long prompts"


def test_unlike_replicas_serve_what_they_are_better_at() -> None:
    """Long prompts on many small replicas, or on few large ones: that is why they are unlike."""
    table = a_table(CHAT, CODE)
    rates = table.rates
    index = {column: s for s, column in enumerate(table.columns)}
    counts = counts_of(table, {"tp4": 2, "tp8": 1})
    ratio = {c: rates[index[c], 1] / rates[index[c], 0] for c in counts}
    better = max(ratio, key=lambda column: ratio[column])
    every = [each.strict for each in apart(together(table, counts), MODEL)]
    least = min(every, key=lambda d: _long(d).total())
    assert set(_long(least)) == {better}


def _long(dispatch: Dispatch) -> Counter[Column]:
    return ungrouped({c: n for c, n in dispatch.counts.items() if c.group == LONG})


def test_models_are_parted_one_by_one() -> None:
    """Whoever parts a second model would mix the first one's prompts again."""
    other = "llama-3.1-8b"
    demand = {MODEL: (CHAT, CODE), other: (CHAT, CODE)}
    table = build(problem(demand, offers(16)), MadeUpRates())
    (pool,) = table.pools
    small = Column(other, pool, Parallelism.parse("tp1"))
    base = together(table, counts_of(table, {"tp4": 2}) + Counter({small: 4}))
    first = next(iter(apart(base, MODEL))).strict
    second = next(iter(apart(first, other))).strict
    assert "; " in second.words
    for j, kind in enumerate(second.table.types):
        assert served_by(second, j) == {int(kind.name)}
        for s in np.flatnonzero(second.shares[:, j]):
            assert second.table.columns[int(s)].model_id == kind.model_id


def test_replicas_are_dealt_out_the_same_each_time() -> None:
    """Weights would move between identical replicas for nothing."""
    table = a_table(CHAT, CODE)
    counts = counts_of(table, {"tp4": 4})
    placed = place_counts(table, counts, EMPTY)
    dispatch = next(iter(apart(together(table, counts), MODEL))).strict
    dealt = deal(placed, dispatch.counts)
    assert dealt == deal(replace(placed), dispatch.counts)
    assert dealt.counts == Counter(dispatch.counts)
    rows = weights(dispatch.table, dealt, dispatch.shares)
    assert not set(rows["0"]) & set(rows["1"])
    assert set(rows["0"]) | set(rows["1"]) == {spec.replica_id for spec in placed.replicas}


def each_share(dispatch: Dispatch, placed: Placed) -> dict[str, list[float]]:
    """By replica, its share of each type."""
    index = {column: s for s, column in enumerate(dispatch.table.columns)}
    return {
        replica_id: (dispatch.shares[index[column]] / dispatch.counts[column]).tolist()
        for replica_id, column in placed.columns.items()
    }


def test_a_plan_s_weights_are_read_as_the_dispatch_that_they_were_made_of() -> None:
    """What stands would be compared as if it were something else."""
    table = a_table(CHAT, CODE)
    counts = counts_of(table, {"tp4": 2, "tp8": 1})
    placed = place_counts(table, counts, EMPTY)
    base = together(table, counts)
    every = [base]
    for split in apart(base, MODEL):
        every += [split.strict, split.one_way, split.both_ways]
    assert len(every) > 3
    for dispatch in every:
        dealt = deal(placed, dispatch.counts)
        rows = weights(dispatch.table, dealt, dispatch.shares)
        found, own = as_weighted(table, placed.columns, rows)
        assert ungrouped(found.counts) == counts
        assert {id_: replace(column, group=0) for id_, column in own.items()} == placed.columns
        assert Counter(own.values()) == Counter(found.counts)
        expected = each_share(dispatch, dealt)
        for id_, shares in each_share(found, replace(placed, columns=own)).items():
            assert shares == pytest.approx(expected[id_], abs=1e-4)


def test_types_that_a_plan_has_no_row_for_go_as_any_type() -> None:
    """A type that is new would count as turned away."""
    table = a_table(CHAT, CODE)
    placed = place_counts(table, counts_of(table, {"tp4": 4}), EMPTY)
    ids = sorted(placed.columns)
    rows = {"*": dict.fromkeys(ids, 0.25), "1": {ids[0]: 1.0}}
    found, own = as_weighted(table, placed.columns, rows)
    assert len(set(own.values())) == 2
    assert found.shares.sum(axis=0) == pytest.approx(1.0)
    shares = each_share(found, replace(placed, columns=own))
    assert [shares[id_][0] for id_ in ids] == pytest.approx([0.25] * 4)
    assert [shares[id_][1] for id_ in ids] == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_groups_serve_as_fast_as_their_columns() -> None:
    """A group is a name, no other hardware."""
    table = a_table(CHAT, CODE)
    column = counts_of(table, {"tp4": 1}).popitem()[0]
    wide = widened(table, [replace(column, group=2), column])
    assert len(wide.columns) == len(table.columns) + 1
    index = {each: s for s, each in enumerate(wide.columns)}
    for each in wide.columns:
        origin = table.columns.index(replace(each, group=0))
        assert np.array_equal(wide.rates[index[each]], table.rates[origin])
    assert widened(table, table.columns).columns == table.columns


@given(
    types=st.lists(
        st.tuples(st.floats(0.1, 20.0), st.floats(10.0, 8000.0), st.floats(1.0, 900.0)),
        min_size=1,
        max_size=4,
    ),
    tp4=st.integers(0, 2),
    tp8=st.integers(0, 1),
)
def test_every_type_goes_somewhere(
    types: list[tuple[float, float, float]], tp4: int, tp8: int
) -> None:
    """Requests without a share would find no replica."""
    table = a_table(*types)
    table = table.only(table.servable())
    counts = counts_of(table, {"tp4": tp4, "tp8": tp8})
    if not +counts or not table.types:
        return
    base = together(table, +counts)
    every = [base]
    for split in apart(base, MODEL):
        every += [split.strict, split.one_way, split.both_ways]
    for dispatch in every:
        copies = np.array([dispatch.counts.get(c, 0) for c in dispatch.table.columns])
        assert not dispatch.shares[copies == 0].any()
        can = (dispatch.table.rates * copies[:, None]).any(axis=0)
        assert dispatch.shares[:, can].sum(axis=0) == pytest.approx(1.0)
