"""Shares of sources, and how they are cut to whole cells."""

import pytest

from services.switcher.transfer import Links
from services.switcher.transfer.links import Network
from services.switcher.transfer.lp import solve
from services.switcher.transfer.rounding import cut
from services.switcher.transfer.sources import choose_sources
from services.switcher.transfer.wants import Holder, Piece, Want
from shared.placement.sheets import Area

SIZE = 1000 * 10 * 7


def want(gpu: str, *holders: str) -> Want:
    pieces = [Piece("mlp", Area((0, 10), (0, 1000)), 7)]
    return Want(gpu, "new", tuple((holder, f"of {holder}") for holder in holders), pieces=pieces)


def network(*gpus: str) -> Network:
    """All on the node that their first letter names; a byte takes a second within it, and less
    between two."""
    return Network(Links(peer=1.0, network=100.0), {gpu: gpu[0] for gpu in gpus})


def test_a_want_is_divided_where_that_saves_time() -> None:
    """Three ranks of two sources: one and a half each, and no plan does better."""
    wants = [want(gpu, "a0", "a1") for gpu in ("a2", "a3", "a4")]
    sourcing = choose_sources(wants, network("a0", "a1", "a2", "a3", "a4"))
    assert 1.498 * SIZE <= sourcing.bound_s <= 1.5 * SIZE * (1 + 1e-9)
    for source in ("a0", "a1"):
        sent = sum(shares.get((source, f"of {source}"), 0.0) for shares in sourcing.shares)
        assert sent == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(("near", "far"), [("b0", "c0"), ("b9", "a9")])
def test_the_own_node_is_preferred_where_time_does_not_tell(near: str, far: str) -> None:
    """The three of node a take longest: what b fetches could come from anywhere."""
    wants = [*(want(gpu, "a0", "a1") for gpu in ("a2", "a3", "a4")), want("b1", near, far)]
    gpus = ("a0", "a1", "a2", "a3", "a4", "b1", near, far)
    shares, _ = solve(wants, network(*gpus), scale_s=SIZE)
    assert shares[3] == {(near, f"of {near}"): pytest.approx(1.0)}


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.25, 1 / 3, 0.5, 0.77777, 0.99999])
def test_a_cut_is_as_near_to_its_share_as_may_be(share: float) -> None:
    """A link would carry more than the plan says."""
    one, other = ("a0", "x"), ("a1", "y")
    whole = want("a2", "a0", "a1")
    shares: dict[Holder, float] = {one: share, other: 1 - share}
    given = {one: 0, other: 0}
    cells: set[tuple[int, int]] = set()
    for holder, piece in cut(whole, shares):
        given[holder] += piece.bytes
        area = piece.area
        found = {(row, unit) for row in range(*area.layers) for unit in range(*area.units)}
        assert not found & cells
        cells |= found
    assert len(cells) == 10 * 1000
    assert abs(given[one] - share * SIZE) <= 2e-4 * SIZE + 7
