"""Properties of the planners on random small clusters, the same rates for all."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.flow import Instance, best_flow, verify
from services.scheduler.policies.flow_preflow import preflow_push
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.joint import GAP_MAX, Terms, best_joint
from services.scheduler.policies.joint import verify as packs
from services.scheduler.policies.joint_policy import OServe
from services.scheduler.policies.oserve_paper import search
from services.scheduler.policies.oserve_paper_policy import OServePaper
from tests.unit.joint_cases import MadeUpRates, offers, problem, table

MODELS = ("llama-2-70b", "llama-3.1-8b")
SHAPES = ("tp1", "tp2", "tp1pp2", "tp4", "tp2pp2", "tp8")
RATES = st.floats(0.05, 20.0)
ROUNDING = 1e-5


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """One or two models, some shapes, one to four types; some types that some shapes cannot do."""
    models = MODELS[: draw(st.integers(1, 2))]
    types = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True))
    rates = {
        (model_id, shape): tuple(
            draw(st.one_of(st.just(0.0), RATES, RATES, RATES)) for _ in range(types)
        )
        for model_id in models
        for shape in shapes
    }
    demand = {model_id: tuple(draw(RATES) for _ in range(types)) for model_id in models}
    gpus = offers(draw(st.integers(1, 16)), per_node=draw(st.sampled_from([2, 4, 8])))
    made = table(rates, demand, gpus)
    return made.only(made.servable())


def wanted(case: Table) -> tuple[str, ...]:
    return tuple(sorted({column.model_id for column in case.columns}))


@given(tables())
@settings(max_examples=60)
def test_no_uniform_plan_and_no_search_beats_the_joint_plan(case: Table) -> None:
    """Its optimum is proven; anything better would be a wrong program."""
    if not case.types:
        return
    best = best_joint(case, "headroom", Terms(wanted=wanted(case)), time_limit_s=20.0)
    found = search(case, Counter(), wanted(case))
    if best is None:
        assert packs(case, found.counts, wanted=wanted(case))
        return
    assert packs(case, best.counts, wanted=wanted(case)) == []
    limit = best.objective * (1 + 2 * GAP_MAX) + ROUNDING
    if not packs(case, found.counts, wanted=wanted(case)):
        assert found.even.headroom <= limit
        most = best_joint(case, "served", Terms(wanted=wanted(case)), time_limit_s=20.0)
        assert most is not None
        assert found.flow.served <= most.objective * (1 + 2 * GAP_MAX)
    for column in case.columns:
        for count in range(1, 17):
            uniform = Counter({column: count})
            if not packs(case, uniform, wanted=wanted(case)):
                flow = best_flow(case.instance(uniform), "headroom")
                assert flow is not None
                assert flow.headroom <= limit


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=80)
def test_flows_are_feasible_and_the_exact_one_is_largest(k: int, j: int, seed: int) -> None:
    """``verify`` works them out again; preflow-push never serves more than the optimum."""
    draw = np.random.default_rng(seed)
    rates = np.where(draw.random((k, j)) < 0.2, 0.0, draw.uniform(0.01, 50.0, (k, j)))
    ceilings = np.where(draw.random((k, j)) < 0.3, draw.uniform(0.1, 5.0, (k, j)), np.inf)
    case = Instance(rates, ceilings, draw.integers(0, 4, k).astype(float), draw.uniform(0.1, 9, j))
    exact, even = best_flow(case, "served"), best_flow(case, "headroom")
    assert exact is not None
    assert even is not None
    pushed = preflow_push(case)
    assert verify(case, exact, served_max=1.0) == []
    assert verify(case, pushed, served_max=1.0) == []
    assert verify(case, even) == []
    assert pushed.served <= exact.served * (1 + ROUNDING) + ROUNDING
    assert min(1.0, even.headroom) * case.demand.sum() <= exact.served * (1 + ROUNDING) + ROUNDING


LENGTHS = st.tuples(st.floats(0.01, 60.0), st.floats(1.0, 20_000.0), st.floats(0.0, 4_000.0))


@given(
    st.lists(LENGTHS, max_size=3),
    st.lists(LENGTHS, max_size=2),
    st.integers(0, 12),
    st.sampled_from(["oserve", "oserve-paper"]),
)
@settings(max_examples=25)
def test_any_demand_on_any_gpus_has_a_plan_or_a_reason(
    large: list[tuple[float, float, float]],
    small: list[tuple[float, float, float]],
    gpus: int,
    name: str,
) -> None:
    """No exception, whole rows, the same answer twice."""
    case = problem({MODELS[0]: large, MODELS[1]: small}, offers(gpus))
    first, second = (_plan(name, case) for _ in range(2))
    assert first == second
    assert first.reason
    if first.plan is not None:
        for row in first.plan.weights.values():
            assert sum(row.values()) == pytest.approx(1.0, abs=1e-9)
        used = [gpu for spec in first.plan.replicas for gpu in spec.gpus]
        assert len(used) == len(set(used)) <= gpus


def _plan(name: str, case: Problem) -> Planned:
    policy = OServe(MadeUpRates()) if name == "oserve" else OServePaper(MadeUpRates())
    return policy.plan(case)
