"""Who holds what of a model, and who takes whose requests over."""

from collections import Counter

import pytest

from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.placement.sheets import (
    Area,
    ModelShape,
    Rank,
    areas_of,
    cache_token_bytes,
    check_shape,
    interval,
    kv_heads,
    query_heads,
    sheets_of,
    weight_bytes,
)
from shared.placement.spread import target_of
from tests.support.transfers import LLAMA_70B, SMALL


def ranks(text: str) -> list[Rank]:
    shape = Parallelism.parse(text)
    return [Rank.of(number, shape) for number in range(shape.gpus)]


def test_a_whole_model_weighs_what_is_published() -> None:
    """Llama 3 70B has 70,553,706,496 parameters; else every plan's bytes would be wrong."""
    assert weight_bytes(LLAMA_70B, Rank()) == 2 * 70_553_706_496
    assert cache_token_bytes(LLAMA_70B, Rank()) == 80 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("shape", ["tp1", "tp2", "tp3", "tp4", "tp4pp2", "tp1pp4", "tp3pp5", "tp8"])
def test_ranks_hold_every_cell_and_what_cannot_be_cut_is_held_by_all(shape: str) -> None:
    """Otherwise a weight would be nowhere, or summed twice."""
    tp = Parallelism.parse(shape).tp
    for name, sheet in sheets_of(SMALL).items():
        held = Counter(
            (layer, unit)
            for rank in ranks(shape)
            if (area := areas_of(SMALL, rank).get(name)) is not None
            for layer in range(*area.layers)
            for unit in range(*area.units)
        )
        assert len(held) == sheet.layers * sheet.units
        if name in {"layer", "final_norm"}:
            assert set(held.values()) == {tp}
        elif name not in {"kv", "cache"} or tp <= SMALL.kv_heads:
            assert set(held.values()) == {1}


@pytest.mark.parametrize("tp", range(1, 9))
def test_a_query_head_is_beside_the_kv_head_that_it_reads(tp: int) -> None:
    """Otherwise a rank would have to fetch keys from another in each step."""
    shared = SMALL.heads // SMALL.kv_heads
    for rank in ranks(f"tp{tp}"):
        heads, kv = query_heads(SMALL, rank), kv_heads(SMALL, rank)
        assert heads[0] < heads[1]
        assert {head // shared for head in range(*heads)} == set(range(*kv))


def test_tied_embeddings_are_on_the_first_and_the_last_stage() -> None:
    """Otherwise the last stage could not make logits."""
    tied = ModelShape(
        model_id="t", layers=4, hidden=8, intermediate=8, heads=2, kv_heads=2, head_dim=4,
        vocabulary=10, item_bytes=2, tied_embeddings=True,
    )  # fmt: skip
    held = ["embedding" in areas_of(tied, rank) for rank in ranks("tp1pp3")]
    assert held == [True, False, True]
    assert "output" not in sheets_of(tied)


def test_intervals_are_nearly_equal_and_leave_nothing_out() -> None:
    """Some columns would be on no rank, or on two."""
    assert [interval(7, part=part, parts=3) for part in range(3)] == [(0, 3), (3, 5), (5, 7)]


def test_areas_meet_where_both_are() -> None:
    """Copies would fetch cells that their source does not hold, or leave some out."""
    one, other = Area((0, 4), (2, 6)), Area((3, 8), (0, 3))
    assert one.meet(other) == Area((3, 4), (2, 3))
    assert one.meet(Area((4, 8), (2, 6))) is None
    assert one.cells == 16


def test_shapes_that_cannot_be_are_refused() -> None:
    """A rank without a head or a layer would compute nothing."""
    with pytest.raises(ConfigInvalid):
        check_shape(SMALL, Parallelism(tp=9))
    with pytest.raises(ConfigInvalid):
        check_shape(SMALL, Parallelism(pp=7))


def test_requests_are_spread_by_weight() -> None:
    """Otherwise a small replica would get as many requests as a large one."""
    rows = {"*": {"a": 3.0, "b": 1.0, "c": 0.0}}
    counts = Counter(target_of(f"r{i}", 0, rows) for i in range(4000))
    assert counts["c"] == 0
    assert 0.72 < counts["a"] / 4000 < 0.78


def test_a_replica_that_comes_takes_requests_and_moves_no_others() -> None:
    """Otherwise KV cache that was copied ahead would be at the wrong replica."""
    before = {"*": {"a": 1.0, "b": 1.0}}
    after = {"*": {"a": 1.0, "b": 1.0, "c": 1.0}}
    for i in range(500):
        target = target_of(f"r{i}", 0, after)
        assert target in {"c", target_of(f"r{i}", 0, before)}


def test_rows_are_chosen_by_type() -> None:
    """Requests of a type would be spread as another type is."""
    rows = {"1": {"a": 1.0}, "*": {"b": 1.0}}
    assert target_of("r", 1, rows) == "a"
    assert target_of("r", 2, rows) == "b"
    assert target_of("r", 2, {"1": {"a": 1.0}}) == "a"
    assert target_of("r", 1, {"1": {"a": 0.0}}) == ""
    assert target_of("r", 1, {}) == ""
