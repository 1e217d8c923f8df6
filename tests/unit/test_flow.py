"""The fluid flow on instances that can be solved by hand."""

import numpy as np
import pytest

from services.scheduler.policies.flow import (
    Flow,
    Instance,
    best_flow,
    duals,
    formulate,
    measured,
    solve,
    verify,
)


def instance(
    rates: list[list[float]],
    demand: list[float],
    *,
    copies: list[float] | None = None,
    ceilings: list[list[float]] | None = None,
) -> Instance:
    n = np.array(rates)
    return Instance(
        n,
        np.full_like(n, np.inf) if ceilings is None else np.array(ceilings),
        np.ones(len(n)) if copies is None else np.array(copies),
        np.array(demand),
    )


def best(case: Instance, objective: str, load: float = 1.0) -> Flow:
    assert objective in {"served", "headroom", "lean"}
    flow = best_flow(case, objective, load=load)  # pyright: ignore[reportArgumentType]  # checked
    assert flow is not None
    return flow


SWAPPED = [[10.0, 1.0], [1.0, 10.0]]


def test_each_type_goes_to_the_replica_that_is_good_at_it() -> None:
    """Otherwise unlike replicas would be worth no more than alike ones."""
    flow = best(instance(SWAPPED, [10.0, 10.0]), "served")
    assert flow.served == pytest.approx(20.0)
    assert flow.sent == pytest.approx(np.array([[10.0, 0.0], [0.0, 10.0]]))


def test_overload_is_served_as_far_as_the_replicas_time_reaches() -> None:
    """One replica of 6 or 2 requests/s: three quick ones take half of it, the rest one slow one."""
    flow = best(instance([[6.0, 2.0]], [3.0, 6.0]), "served")
    assert flow.served == pytest.approx(4.0)
    assert flow.loads == pytest.approx([1.0])


def test_headroom_is_the_same_for_every_type() -> None:
    """3/6 + 1/2 = 1: exactly the demand fits, and half of it would fit twice."""
    assert best(instance([[6.0, 2.0]], [3.0, 1.0]), "headroom").headroom == pytest.approx(1.0)
    assert best(instance([[6.0, 2.0]], [1.5, 0.5]), "headroom").headroom == pytest.approx(2.0)


def test_headroom_tells_apart_what_served_cannot() -> None:
    """Under light load both deployments serve all; only one of them has room to spare."""
    small, large = instance([[4.0]], [1.0]), instance([[8.0]], [1.0])
    assert best(small, "served").served == best(large, "served").served
    assert best(large, "headroom").headroom == 2 * best(small, "headroom").headroom


def test_lean_takes_the_least_of_the_replicas_time() -> None:
    """Type 0 is served by either replica, but takes a tenth of the time on the first."""
    flow = best(instance([[10.0, 1.0], [1.0, 1.0]], [1.0, 0.5]), "lean", load=0.7)
    assert flow.sent[0, 0] == pytest.approx(1.0)
    assert flow.loads.max() <= 0.7 + 1e-6


def test_lean_says_when_the_load_cannot_be_kept() -> None:
    """Half a replica cannot do the work of a whole one."""
    assert best_flow(instance([[2.0]], [2.0]), "lean", load=0.5) is None


def test_ceilings_hold_for_each_copy() -> None:
    """A replica with room for 2 requests/s of KV cache takes 2, however fast it computes."""
    flow = best(instance([[10.0]], [9.0], copies=[3.0], ceilings=[[2.0]]), "served")
    assert flow.served == pytest.approx(6.0)
    assert best(
        instance([[10.0]], [9.0], copies=[3.0], ceilings=[[2.0]]), "headroom"
    ).headroom == pytest.approx(6 / 9)


def test_copies_count_as_that_many_replicas() -> None:
    """A plan with counts and the same plan written out are the same plan."""
    counted = best(instance([[3.0, 1.0], [1.0, 2.0]], [4.0, 3.0], copies=[2.0, 1.0]), "headroom")
    written = best(instance([[3.0, 1.0], [3.0, 1.0], [1.0, 2.0]], [4.0, 3.0]), "headroom")
    assert counted.headroom == pytest.approx(written.headroom)


def test_a_type_that_nothing_serves_leaves_no_headroom() -> None:
    """It says so instead of leaving the type out."""
    assert best(instance([[3.0, 0.0]], [1.0, 1.0]), "headroom").headroom == 0.0
    assert best(instance([[3.0, 0.0]], [1.0, 1.0]), "served").served == pytest.approx(1.0)


def test_nothing_at_all_is_a_flow_of_nothing() -> None:
    """No replica, or none that can do anything, must not be an exception."""
    assert best(instance([[0.0]], [1.0]), "served").served == 0.0
    assert best(instance([[5.0]], [1.0], copies=[0.0]), "headroom").headroom == 0.0
    assert solve(formulate(instance([[0.0]], [1.0]), "lean")) is None


def test_shares_of_served_types_sum_to_one() -> None:
    """They become weights."""
    flow = best(instance([[3.0, 0.0], [1.0, 0.0]], [1.0, 1.0]), "headroom")
    assert flow.shares().sum(axis=0) == pytest.approx([0.0, 0.0])
    flow = best(instance([[3.0], [1.0]], [1.0]), "headroom")
    assert flow.shares() == pytest.approx(np.array([[0.75], [0.25]]))


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ([[2.1]], "row 0 is used 1.05"),
        ([[-1.0]], "gets -1"),
        ([[1.6]], "not 0 to 1.5"),
        ([[1.4]], "type 0 is served 1.4 of 1"),
    ],
)
def test_verify_finds_what_a_solver_got_wrong(sent: list[list[float]], complaint: str) -> None:
    """It is the last word before a plan goes out."""
    ceiling = [[1.5]] if "1.5" in complaint else None
    case = instance([[2.0]], [1.0], ceilings=ceiling)
    wrong = verify(case, measured(case, np.array(sent)), served_max=1.0)
    assert any(complaint in line for line in wrong), wrong


def test_duals_bound_what_another_replica_brings() -> None:
    """They are what the bottleneck, and the worth of one more GPU, are told by."""
    case = instance([[10.0, 1.0], [1.0, 10.0], [4.0, 4.0]], [5.0, 2.0], copies=[2.0, 1.0, 0.0])
    for objective in ("headroom", "served"):
        before = best(case, objective)
        found = duals(case, objective)  # pyright: ignore[reportArgumentType]  # from the tuple
        value = before.headroom if objective == "headroom" else before.served
        assert found.optimum == pytest.approx(value)
        for k in range(3):
            copies = [2.0, 1.0, 0.0]
            copies[k] += 1.0
            flow = best(instance(case.rates.tolist(), [5.0, 2.0], copies=copies), objective)
            after = flow.headroom if objective == "headroom" else flow.served
            assert after - value <= found.replica[k] * (1 + 1e-6) + 1e-9
            copies[k] -= 1.0 - 1e-3
            flow = best(instance(case.rates.tolist(), [5.0, 2.0], copies=copies), objective)
            after = flow.headroom if objective == "headroom" else flow.served
            assert after - value == pytest.approx(1e-3 * found.replica[k], rel=0.01, abs=1e-7)


def test_replicas_are_worth_the_headroom_that_they_make() -> None:
    """Their worth adds up to it, and types take all of that between them."""
    case = instance([[6.0, 2.0], [3.0, 4.0]], [3.0, 1.0], copies=[2.0, 1.0])
    found = duals(case, "headroom")
    assert float(found.replica @ case.copies) == pytest.approx(found.optimum)
    assert found.types.sum() == pytest.approx(1.0)


def test_duals_of_what_serves_nothing_are_what_the_first_replica_brings() -> None:
    """A plan is filled from nothing by them."""
    case = instance([[6.0], [2.0]], [3.0], copies=[0.0, 0.0])
    assert duals(case, "served").replica == pytest.approx([6.0, 2.0])
    assert duals(case, "headroom").replica == pytest.approx([2.0, 2 / 3])
    with pytest.raises(AssertionError):
        duals(instance([[1.0]], [1.0], ceilings=[[1.0]]), "headroom")
