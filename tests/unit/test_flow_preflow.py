"""The paper's preflow-push: where it is as good as the linear program, and where it is not."""

import numpy as np
import pytest

from services.scheduler.policies.flow import Array, Instance, best_flow
from services.scheduler.policies.flow_preflow import preflow_push


def served(rates: Array, demand: Array, copies: Array) -> tuple[float, float]:
    """By preflow-push, and by the linear program."""
    case = Instance(rates, np.full_like(rates, np.inf), copies, demand)
    exact = best_flow(case, "served")
    assert exact is not None
    return preflow_push(case).served, exact.served


@pytest.mark.parametrize("seed", range(20))
def test_types_that_take_alike_give_a_true_maximum(seed: int) -> None:
    """Requests and units are then the same thing, and this is textbook maximum flow."""
    draw = np.random.default_rng(seed)
    replicas, types = int(draw.integers(1, 7)), int(draw.integers(1, 6))
    rates = np.outer(draw.uniform(0.2, 5, replicas), np.ones(types))
    copies = draw.integers(1, 4, replicas).astype(float)
    pushed, exact = served(rates, draw.uniform(0.1, 8, types), copies)
    assert pushed == pytest.approx(exact)


@pytest.mark.parametrize("seed", range(20))
def test_replicas_that_rank_types_alike_serve_all_that_can_be_served(seed: int) -> None:
    """Units can then be chosen without gains: what fits at all, it fits."""
    draw = np.random.default_rng(seed)
    replicas, types = int(draw.integers(1, 7)), int(draw.integers(1, 6))
    rates = np.outer(draw.uniform(0.2, 5, replicas), draw.uniform(0.2, 5, types))
    copies, demand = np.ones(replicas), draw.uniform(0.1, 8, types)
    even = best_flow(Instance(rates, np.full_like(rates, np.inf), copies, demand), "headroom")
    assert even is not None
    demand = demand * even.headroom * 0.999
    assert served(rates, demand, copies)[0] == pytest.approx(demand.sum())


def test_types_on_each_others_replica_stay_there() -> None:
    """Each type is ten times as quick on one of two replicas, and all demand would fit. The second
    type fills the replica of the first: exchanging them is a cycle, and no path to the sink."""
    rates = np.array([[10.0, 1.0], [1.0, 10.0]])
    pushed, exact = served(rates, np.array([5.0, 10.0]), np.ones(2))
    assert exact == pytest.approx(15.0)
    assert pushed == pytest.approx(10.1)


def test_overload_is_not_spent_on_the_quick_ones() -> None:
    """It fills the replica with what came first."""
    pushed, exact = served(np.array([[6.0, 2.0]]), np.array([3.0, 6.0]), np.ones(1))
    assert exact == pytest.approx(4.0)
    assert pushed < exact


def test_ceilings_and_closed_arcs_hold() -> None:
    """Whatever it pushes passes the flow's own verification, also with no way through."""
    rates = np.array([[4.0, 0.0], [0.0, 0.0]])
    case = Instance(rates, np.array([[1.5, 1.0], [1.0, 1.0]]), np.array([2.0, 1.0]), np.ones(2) * 9)
    assert preflow_push(case).sent == pytest.approx(np.array([[3.0, 0.0], [0.0, 0.0]]))
