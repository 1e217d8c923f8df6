"""As few GPUs as the demand needs, by slices; and what is done where GPUs are short."""

from collections import Counter
from dataclasses import replace
from itertools import product
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.interface import Needs, Planned
from services.scheduler.policies.joint import GAP_MAX, Terms, best_joint, verify
from services.scheduler.policies.melange import Market, Melange
from tests.unit.joint_cases import MadeUpRates, offers, problem, table

M, SMALL = "llama-2-70b", "llama-3.1-8b"
LIMIT_S = 20.0
RATES = st.floats(0.2, 5.0)


def market(case: Table, *, slices: int = 4, least: dict[str, int] | None = None) -> Market:
    return Market(case, Terms().hourly(case), least or {}, slices)


def shapes(planned: Planned) -> Counter[tuple[str, str]]:
    assert planned.plan is not None
    return Counter((spec.model_id, spec.parallelism) for spec in planned.plan.replicas)


def test_gpus_that_are_not_needed_idle() -> None:
    """That is what it is for: one replica carries this, and there is room for sixteen."""
    case = table({(M, "tp1"): (4.0,), (M, "tp4"): (9.0,)}, {M: (3.0,)}, offers(16))
    found = market(case).cheapest(LIMIT_S)
    assert found is not None
    assert found.counts == {case.columns[0]: 1}
    assert (found.price, found.share) == (1.0, 1.0)


def test_a_slice_goes_to_one_shape_whole() -> None:
    """With two slices of 2 requests/s each, shapes that serve 3 take one each; with eight of 0.5,
    they take more of them, and a replica is saved."""
    case = table({(M, "tp1"): (3.0,)}, {M: (9.0,)}, offers(16))
    coarse, fine = (market(case, slices=slices).cheapest(LIMIT_S) for slices in (2, 8))
    assert coarse is not None
    assert fine is not None
    assert coarse.counts[case.columns[0]] == fine.counts[case.columns[0]] == 3
    apart = table({(M, "tp1"): (3.0,), (M, "tp2"): (5.9,)}, {M: (8.0,)}, offers(16))
    for slices in (1, 2, 4, 8):
        found = market(apart, slices=slices).cheapest(LIMIT_S)
        assert found is not None
        assert found.price == pytest.approx(_brute(apart, slices))


@given(st.lists(RATES, min_size=4, max_size=4), st.lists(RATES, min_size=2, max_size=2))
@settings(max_examples=30)
def test_the_price_is_that_of_the_best_of_all_assignments(
    rates: list[float], demand: list[float]
) -> None:
    """Binary slices, tried one by one, where the program counts them."""
    case = table(
        {(M, "tp1"): tuple(rates[:2]), (M, "tp2"): tuple(rates[2:])},
        {M: tuple(demand)},
        offers(256),
    )
    found = market(case, slices=3).cheapest(LIMIT_S)
    assert found is not None
    assert found.price is not None
    assert found.price == pytest.approx(_brute(case, 3), rel=2 * GAP_MAX)
    joint = best_joint(case, "thrift", Terms(), time_limit_s=LIMIT_S)
    assert joint is not None
    assert found.price >= joint.bound * (1 - GAP_MAX), "slices are a restriction"


def _brute(case: Table, slices: int) -> float:
    """The least price over every assignment of single slices to columns."""
    buckets = [j for j in range(len(case.types)) for _ in range(slices)]
    best = np.inf
    for chosen in product(range(len(case.columns)), repeat=len(buckets)):
        load = np.zeros(len(case.columns))
        for s, j in zip(chosen, buckets, strict=True):
            load[s] += case.demand[j] / slices / case.rates[s, j]
        price = sum(
            ceil(each - 1e-9) * column.shape.gpus
            for each, column in zip(load, case.columns, strict=True)
        )
        best = min(best, price)
    return best


def test_of_equally_cheap_shapes_the_faster_is_taken() -> None:
    """Which one a solver meets first is no choice."""
    rates = {(M, "tp1pp2"): (1.0,), (M, "tp2"): (2.0,)}
    case = table(rates, {M: (0.5,)}, offers(8))
    found = market(case).cheapest(LIMIT_S)
    assert found is not None
    assert [str(column.shape) for column in found.counts] == ["tp2pp1"]


def test_prices_decide_between_kinds() -> None:
    """Half as fast at a quarter of the price is the better deal."""
    demand = {M: (4.0,)}
    fast = table({(M, "tp1"): (2.0,)}, demand, offers(8))
    slow = table({(M, "tp1"): (1.0,)}, demand, offers(8, kind="l40s"))
    case = replace(
        fast,
        pools={**fast.pools, **slow.pools},
        columns=(*fast.columns, *slow.columns),
        rates=np.vstack([fast.rates, slow.rates]),
    )
    for price, pool, count in ((1.0, "h100", 2), (0.25, "l40s", 4)):
        hourly = Terms(prices={"l40s": price}).hourly(case)
        found = Market(case, hourly, {}, 4).cheapest(LIMIT_S)
        assert found is not None
        ((column, got),) = found.counts.items()
        assert (column.pool, got) == (pool, count)


def test_where_gpus_do_not_suffice_what_can_be_served_is() -> None:
    """The original has no answer there; a mesh has to serve on."""
    case = table({(M, "tp1"): (1.0, 1.0)}, {M: (8.0, 8.0)}, offers(4))
    assert market(case).cheapest(LIMIT_S) is None
    found = market(case).most(LIMIT_S)
    assert found is not None
    assert found.counts == {case.columns[0]: 4}
    assert found.share == pytest.approx(0.25)
    assert found.slices.sum() == 8
    assert market(case, least={M: 5}).most(LIMIT_S) is None


def test_the_least_replicas_are_bought_also_without_demand() -> None:
    """And a type that takes next to no time has a replica all the same."""
    case = table({(M, "tp1"): (1e6,), (SMALL, "tp1"): (1.0,)}, {M: (1e-6,)}, offers(4))
    found = market(case, least={SMALL: 2}).cheapest(LIMIT_S)
    assert found is not None
    assert {column.model_id: n for column, n in found.counts.items()} == {M: 1, SMALL: 2}


def test_the_policy_uses_what_it_needs_and_says_so() -> None:
    """Weights follow the slices; the answer is the same twice, and fits the nodes."""
    case = problem({M: [(0.5, 500.0, 100.0), (0.2, 100.0, 800.0)]}, offers(16))
    answer = Melange(MadeUpRates()).plan(case)
    assert answer == Melange(MadeUpRates()).plan(case)
    assert answer.plan is not None
    used = sum(len(spec.gpus) for spec in answer.plan.replicas)
    assert used < 16
    assert f"on {used} of 16 GPUs" in answer.reason
    assert answer.decision is not None
    assert answer.decision.goal == "thrift"
    assert answer.decision.optimal
    assert answer.decision.objective == used
    for row in answer.plan.weights.values():
        assert sum(row.values()) == pytest.approx(1.0)
        assert all(share * 4 % 1 == pytest.approx(0.0, abs=1e-5) for share in row.values()) or len(
            row
        ) > len({spec.parallelism for spec in answer.plan.replicas})


def test_the_policy_serves_on_under_any_load() -> None:
    """From hardly anything to far too much: a plan that fits, and more GPUs for more."""
    before = 0
    for rps in (1e-6, 0.1, 1.0, 4.0, 1e3, 1e6):
        answer = Melange(MadeUpRates()).plan(problem({M: [(rps, 500.0, 100.0)]}, offers(16)))
        assert answer.plan is not None
        used = sum(len(spec.gpus) for spec in answer.plan.replicas)
        assert before <= used <= 16
        before = used
    assert "the GPUs do not suffice" in answer.reason
    assert before >= 14


def test_models_for_which_there_are_no_gpus_are_named() -> None:
    """Two GPUs hold one of two models."""
    case = problem({M: [(1.0, 500.0, 100.0)], SMALL: []}, offers(2))
    assert shapes(Melange(MadeUpRates()).plan(case)) == {(M, "tp2pp1"): 1}
    assert f"no GPUs for {SMALL}" in Melange(MadeUpRates()).plan(case).reason
    cold = replace(case, needs=Needs(replicas_min={SMALL: 0}))
    assert "no GPUs" not in Melange(MadeUpRates()).plan(cold).reason


def test_counts_fit_nodes() -> None:
    """GPUs left over on several nodes are not one replica's."""
    case = table({(M, "tp2"): (1.0,)}, {M: (3.0,)}, offers(9, per_node=3))
    found = market(case).cheapest(LIMIT_S)
    assert found is not None
    assert found.counts == {case.columns[0]: 3}
    assert verify(case, found.counts, wanted=()) == []
    more = table({(M, "tp2"): (1.0,)}, {M: (4.0,)}, offers(9, per_node=3))
    assert market(more).cheapest(LIMIT_S) is None, "9 GPUs, and room for three replicas of 2"
