"""What plans are rehearsed with: the past's bursts at the level that is expected."""

import numpy as np
import pytest

from services.scheduler.policies.capacity_types import TypeDemand
from services.scheduler.policies.history import BURSTS, WINDOWS_MIN, Pattern, pattern_of
from services.scheduler.policies.interface import PastWindow


def kind_of(name: str, rps: float, model_id: str = "m") -> TypeDemand:
    return TypeDemand(
        model_id=model_id, name=name, arrivals_rps=rps, input_tokens=100.0, output_tokens=100.0
    )


def past_of(*rates: dict[int, float]) -> tuple[PastWindow, ...]:
    return tuple(PastWindow(seconds=10.0, arrivals_rps=rate) for rate in rates)


def test_bursts_of_the_past_come_again() -> None:
    """A plan that is rehearsed in calm is chosen for its calm."""
    rates = [2.0, 2.0, 2.0, 14.0] * 8
    pattern = pattern_of(
        [kind_of("0", 5.5)], {"m": past_of(*({0: r} for r in rates))}, horizon_s=30.0
    )
    assert pattern.rates[:, 0] == pytest.approx(rates)
    assert pattern.length_s == 320.0


def test_a_shift_is_taken_for_one() -> None:
    """Plans would lag by the length of the past behind every change of the mix."""
    past = {"m": past_of(*({0: 9.0 + i % 3} for i in range(36)))}
    pattern = pattern_of([kind_of("0", 40.0)], past, horizon_s=30.0)
    assert float(pattern.rates.mean()) == pytest.approx(40.0)
    calm = pattern_of([kind_of("0", 10.4)], past, horizon_s=30.0)
    assert float(calm.rates.mean()) == pytest.approx(10.0)


def test_the_past_is_played_as_it_was_where_that_is_asked_for() -> None:
    """Who goes where would follow each forecast of a burst, and be late for both sides."""
    past = {"m": past_of(*({0: 9.0 + i % 3} for i in range(36)))}
    as_it_was = pattern_of([kind_of("0", 40.0)], past, horizon_s=30.0, follow=False)
    assert as_it_was.rates[:, 0] == pytest.approx([9.0 + i % 3 for i in range(36)])
    assert as_it_was.means == pytest.approx([10.0])
    uneven = Pattern(seconds=np.array([10.0, 30.0]), rates=np.array([[1.0, 0.0], [5.0, 4.0]]))
    assert uneven.means == pytest.approx([4.0, 3.0]), "by their length"


def test_without_a_past_bursts_are_assumed() -> None:
    """The first plan of a mesh would be one for a calm that never comes."""
    pattern = pattern_of([kind_of("0", 3.0), kind_of("1", 1.0)], {}, horizon_s=30.0)
    assert np.array(BURSTS).mean() == pytest.approx(1.0)
    assert pattern.rates.mean(axis=0) == pytest.approx([3.0, 1.0])
    assert pattern.rates.max(axis=0) == pytest.approx([4.8, 1.6])


def test_a_long_past_is_cut_to_its_newest_part() -> None:
    """Rehearsals would take as long as the past is busy."""
    past = {"m": past_of(*({0: float(i + 1)} for i in range(30)))}
    pattern = pattern_of([kind_of("0", 15.5)], past, horizon_s=30.0)
    assert pattern.newest(900.0).rates[:, 0] == pytest.approx([28.0, 29.0, 30.0])
    assert pattern.newest(1.0).rates[:, 0] == pytest.approx([30.0])
    assert pattern.newest(1e9).length_s == pattern.length_s


def test_a_new_type_bursts_beside_old_ones() -> None:
    """It would be left out, or make the past of the others worthless."""
    past = {"m": past_of(*({0: 4.0} for _ in range(WINDOWS_MIN)))}
    pattern = pattern_of([kind_of("0", 4.0), kind_of("7", 2.0)], past, horizon_s=30.0)
    assert pattern.rates[:, 0] == pytest.approx(4.0)
    assert float(pattern.rates[:, 1].max()) == pytest.approx(3.2)


def test_models_share_the_windows_that_all_have() -> None:
    """A model that was added later would have arrivals before it was there."""
    past = {"m": past_of(*({0: float(i)} for i in range(60))), "n": past_of(*([{0: 1.0}] * 30))}
    pattern = pattern_of([kind_of("0", 44.5), kind_of("0", 1.0, "n")], past, horizon_s=30.0)
    assert pattern.rates.shape == (30, 2)
    assert pattern.rates[:, 0] == pytest.approx([float(i) for i in range(30, 60)])
