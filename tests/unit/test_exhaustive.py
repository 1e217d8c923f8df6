"""Looking at every deployment: that none is left out, that the best is found, and what is said when
there are too many."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from services.scheduler.policies.capacity import Column, Pool, Table, pools
from services.scheduler.policies.exhaustive import exhaust, kept_columns
from services.scheduler.policies.exhaustive_policy import Exhaustive
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.interface import Needs, Problem
from services.scheduler.policies.joint import GAP_MAX, Terms, best_joint, verify
from services.scheduler.policies.packings import Packings
from shared.hardware import Parallelism
from tests.unit.joint_cases import EMPTY, MadeUpRates, offers, problem, table

M, SMALL = "llama-2-70b", "llama-3.1-8b"
SHAPES = ("tp1", "tp2", "tp1pp2", "tp4", "tp2pp2", "tp8", "tp1pp4", "tp8pp2")
RATES = st.floats(0.05, 20.0)
ROUNDING = 1e-5


def fill(columns: list[Column], pool: Pool) -> Iterator[tuple[int, ...]]:
    """All counts that fit the pool, one after the other, by putting replicas on nodes."""
    made = table({(M, "tp1"): (1.0,)}, {M: (1.0,)}, offers(1))
    case = replace(made, pools={pool.name: pool}, columns=tuple(columns))
    gpus = sum(pool.node_gpus)
    for counts in product(*(range(gpus // column.shape.gpus + 1) for column in columns)):
        chosen = {column: n for column, n in zip(columns, counts, strict=True) if n}
        if not verify(case, chosen, wanted=()):
            yield counts


@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
)
@settings(max_examples=60)
def test_packings_are_those_that_leave_no_room(shapes: list[str], gpus: int, node: int) -> None:
    """Each once; the number of them is known without listing them."""
    (pool,) = pools(offers(gpus, per_node=node)).values()
    columns = [Column(M, pool.name, Parallelism.parse(shape)) for shape in shapes]
    found = list(Packings(pool, columns, count_max=[None] * len(columns)))
    every = set(fill(columns, pool))
    full = [
        counts
        for counts in every
        if not any(
            tuple(n + (i == k) for i, n in enumerate(counts)) in every for k in range(len(columns))
        )
    ]
    assert sorted(found) == sorted(full)


def test_the_number_of_packings_is_known_without_listing_them() -> None:
    """It is what an answer that looked at some of them is judged by."""
    for gpus in (8, 16, 24):
        (pool,) = pools(offers(gpus)).values()
        columns = [Column(M, pool.name, Parallelism.parse(shape)) for shape in SHAPES]
        packings = Packings(pool, columns, count_max=[None] * 7 + [0])
        assert packings.total == len(set(packings))
        assert [packings.at(rank) for rank in range(packings.total)] == list(packings)
    (pool,) = pools(offers(256)).values()
    columns = [Column(M, pool.name, Parallelism.parse(shape)) for shape in SHAPES]
    assert Packings(pool, columns, count_max=[None] * 8).total > 10**8


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """One or two models, some shapes, one to three types; some that some shapes cannot do; two
    kinds of GPU at times."""
    models = (M, SMALL)[: draw(st.integers(1, 2))]
    types = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True))

    def rates(kind: str) -> dict[tuple[str, str], tuple[float, ...]]:
        del kind
        return {
            (model_id, shape): tuple(
                draw(st.one_of(st.just(0.0), RATES, RATES, RATES)) for _ in range(types)
            )
            for model_id in models
            for shape in shapes
        }

    demand = {model_id: tuple(draw(RATES) for _ in range(types)) for model_id in models}
    gpus = offers(draw(st.integers(1, 16)), per_node=draw(st.sampled_from([2, 3, 4, 8])))
    made = table(rates("h100"), demand, gpus)
    if draw(st.booleans()):
        other = table(rates("l40s"), demand, offers(draw(st.integers(1, 4)), kind="l40s"))
        made = replace(
            made,
            pools={**made.pools, **other.pools},
            columns=(*made.columns, *other.columns),
            rates=np.vstack([made.rates, other.rates]),
        )
    return made.only(made.servable())


@given(tables())
@settings(max_examples=100)
def test_it_finds_the_objective_of_the_joint_program(case: Table) -> None:
    """Two ways to the optimum that share the flow at most: where they differ, one is wrong."""
    if not case.types:
        return
    models = sorted({column.model_id for column in case.columns})
    looked = exhaust(case, dict.fromkeys(models, 1))
    joint = best_joint(case, "headroom", Terms(wanted=models), time_limit_s=20.0)
    if looked is None:
        assert joint is None
        return
    if looked.goal == "served":
        joint = best_joint(case, "served", Terms(wanted=models), time_limit_s=20.0)
    assert joint is not None
    assert looked.exact
    assert joint.objective <= looked.objective * (1 + ROUNDING)
    assert looked.objective <= joint.bound * (1 + ROUNDING)
    assert looked.objective == pytest.approx(joint.objective, rel=2 * GAP_MAX)
    assert verify(case, looked.counts, wanted=models) == []


@given(tables())
@settings(max_examples=20)
def test_nothing_that_is_left_out_is_better(case: Table) -> None:
    """Every deployment at all, its flow solved: no maximal ones, no bounds, no replaced columns."""
    if not case.types or len(case.pools) > 1 or case.gpus() > 6:
        return
    looked = exhaust(case, {})
    assert looked is not None
    (pool,) = case.pools.values()
    best = 0.0
    for counts in fill(list(case.columns), pool):
        chosen = Counter(dict(zip(case.columns, counts, strict=True)))
        flow = best_flow(case.instance(chosen), looked.goal)
        assert flow is not None
        best = max(best, flow.headroom if looked.goal == "headroom" else flow.served)
    assert looked.objective == pytest.approx(best, rel=ROUNDING, abs=ROUNDING)


def test_columns_are_left_out_only_for_others_that_do_as_much() -> None:
    """Two of tp2 do all that a tp4 does; a tp8 is better at something; equal ones count once."""
    case = table(
        {
            (M, "tp2"): (1.0, 1.0),
            (M, "tp4"): (2.0, 1.5),
            (M, "tp2pp2"): (2.0, 1.5),
            (M, "tp8"): (3.0, 9.0),
            (SMALL, "tp4"): (1.0, 1.0),
        },
        {M: (1.0, 1.0), SMALL: (1.0, 1.0)},
        offers(8),
    )
    assert [str(case.columns[s].shape) for s in kept_columns(case)] == [
        "tp2pp1",
        "tp8pp1",
        "tp4pp1",
    ]
    equal = table({(M, "tp4"): (2.0,), (M, "tp2pp2"): (2.0,)}, {M: (1.0,)}, offers(8))
    assert len(kept_columns(equal)) == 1


def test_too_many_deployments_are_said_to_be_too_many() -> None:
    """An answer that pretends to be the best one could not be used to judge others by."""
    draw = np.random.default_rng(3)
    rates = {(M, shape): tuple(draw.uniform(1.0, 2.0, 3) * i) for i, shape in enumerate(SHAPES, 1)}
    case = table(rates, {M: (1.0, 2.0, 3.0)}, offers(32))
    every = exhaust(case, {M: 1})
    assert every is not None
    assert every.exact
    assert every.listed == every.total > 100
    assert every.flows < every.total, "bounds save flows"
    some = exhaust(case, {M: 1}, listed_max=50)
    assert some is not None
    assert (some.exact, some.listed, some.total) == (False, 50, every.total)
    assert some.objective <= every.objective
    few = exhaust(case, {M: 1}, flows_max=1)
    assert few is not None
    assert (few.exact, few.flows) == (False, 1)


def asked(case: Problem, **least: int) -> Problem:
    return replace(case, needs=Needs(replicas_min={M: least["large"], SMALL: least["small"]}))


def test_the_policy_says_what_it_looked_at() -> None:
    """And answers the same twice."""
    case = problem({M: [(0.5, 500.0, 100.0), (0.2, 100.0, 800.0)]}, offers(16))
    answer = Exhaustive(MadeUpRates()).plan(case)
    assert answer == Exhaustive(MadeUpRates()).plan(case)
    assert answer.plan is not None
    assert "the best of all" in answer.reason
    assert answer.decision is not None
    assert answer.decision.optimal
    cut = Exhaustive(MadeUpRates(), listed_max=1).plan(case)
    assert "the best found in 1 of" in cut.reason
    assert cut.decision is not None
    assert cut.decision.bound is None


def test_the_policy_keeps_to_the_least_replicas_as_far_as_gpus_go() -> None:
    """A model that must not be cold has what its operator asks for; where that does not fit, each
    model has one; where even that does not, what is busy is served."""
    demand = {M: [(1.0, 500.0, 100.0)], SMALL: []}

    def count(case: Problem) -> Counter[str]:
        plan = Exhaustive(MadeUpRates()).plan(case).plan
        assert plan is not None
        return Counter(spec.model_id for spec in plan.replicas)

    case = problem(demand, offers(8))
    assert count(asked(case, large=1, small=2))[SMALL] == 2
    assert count(asked(case, large=1, small=0))[SMALL] == 0
    assert count(asked(case, large=1, small=99))[SMALL] == 1
    tight = asked(problem(demand, offers(2)), large=1, small=1)
    assert count(tight) == {M: 1}
    assert f"no GPUs for {SMALL}" in Exhaustive(MadeUpRates()).plan(tight).reason


def test_without_gpus_or_shapes_there_is_a_reason() -> None:
    """And no plan."""
    answer = Exhaustive(MadeUpRates()).plan(problem({M: [(1.0, 1.0, 1.0)]}, offers(1)))
    assert answer.plan is None
    assert answer.reason == f"{M} fits no shape on the GPUs on offer"


def test_gpus_of_any_name_and_order_give_the_same_deployment() -> None:
    """Only how many there are on which node matters."""
    case = problem({M: [(0.5, 500.0, 100.0), (0.2, 100.0, 800.0)]}, offers(16))
    renamed = tuple(replace(offer, gpu_id=f"z{99 - i}") for i, offer in enumerate(case.offers))
    other = replace(
        case, offers=tuple(sorted(renamed, key=lambda offer: offer.gpu_id)), in_force=EMPTY
    )
    shapes = [
        sorted(spec.parallelism for spec in plan.replicas)
        for plan in (Exhaustive(MadeUpRates()).plan(each).plan for each in (case, other))
        if plan is not None
    ]
    assert shapes[0] == shapes[1]
    types = tuple(
        structs.replace(kind, arrivals_rps=2 * kind.arrivals_rps) for kind in case.models[0].types
    )
    twice = replace(case, models=(replace(case.models[0], types=types),))
    first, second = (Exhaustive(MadeUpRates()).plan(each).decision for each in (case, twice))
    assert first is not None
    assert second is not None
    assert first.objective == pytest.approx(2 * (second.objective or 0.0))
