"""The paper's search and its policy."""

from collections import Counter
from dataclasses import replace

import pytest

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.interface import Policy
from services.scheduler.policies.joint import Terms, best_joint, verify
from services.scheduler.policies.oserve_paper import ITERATIONS_MAX, PATIENCE, Found, search
from services.scheduler.policies.oserve_paper_policy import OServePaper
from shared.messages.plans import DeploymentPlan
from tests.unit.joint_cases import MadeUpRates, offers, problem, table

M, SMALL = "llama-2-70b", "llama-3.1-8b"
FOUR = [(4.0, 600.0, 60.0), (2.0, 1500.0, 250.0), (1.0, 3000.0, 30.0), (0.5, 500.0, 900.0)]


def mixed() -> Table:
    """Short work likes small replicas, long work a large one; 8 GPUs serve exactly the demand."""
    return table({(M, "tp1"): (4.0, 0.1), (M, "tp4"): (8.0, 4.0)}, {M: (16.0, 4.0)}, offers(8))


def shapes(found: Found) -> dict[str, int]:
    return {str(column.shape): count for column, count in found.counts.items()}


def test_it_turns_small_replicas_into_the_large_one_that_is_missing() -> None:
    """Eight small ones serve the short type only; the search gives four GPUs to the long one. Sizes
    between are needed on the way: a transfer is of 1, 2 or 4 GPUs."""
    rates = {
        (M, "tp1"): (4.0, 0.1), (M, "tp2"): (6.0, 1.0), (M, "tp4"): (8.0, 4.0),
    }  # fmt: skip
    case = table(rates, {M: (16.0, 4.0)}, offers(8))
    small = next(column for column in case.columns if column.shape.tp == 1)
    found = search(case, Counter({small: 8}), (M,))
    assert shapes(found) == {"tp1pp1": 4, "tp4pp1": 1}
    assert found.flow.served == pytest.approx(20.0)
    assert PATIENCE < found.iterations < ITERATIONS_MAX


def test_it_stays_where_nothing_is_better() -> None:
    """A stable load is no reason to move: 20 iterations, and the same deployment."""
    case = mixed()
    best = best_joint(case, "headroom", Terms(wanted=(M,)), time_limit_s=10.0)
    assert best is not None
    found = search(case, Counter(best.counts), (M,))
    assert found.counts == best.counts
    assert found.iterations == PATIENCE


def test_it_may_stop_in_a_local_optimum() -> None:
    """Without a shape between one and four GPUs no move of it leads on, where the joint program
    finds the plan at once: this is why ours is exact."""
    case = mixed()
    small = next(column for column in case.columns if column.shape.tp == 1)
    found = search(case, Counter({small: 8}), (M,))
    assert found.even.headroom < 0.9


def test_it_starts_from_nothing_and_from_what_does_not_fit() -> None:
    """With no plan in force, or one for GPUs that are gone."""
    case = mixed()
    small = next(column for column in case.columns if column.shape.tp == 1)
    for start in (Counter[object](), Counter({small: 9})):
        found = search(case, Counter(start), (M,))  # pyright: ignore[reportArgumentType]  # empty
        assert not verify(case, found.counts, wanted=(M,))
        assert found.flow.served > 0


def test_no_model_loses_its_last_replica() -> None:
    """Even where its GPUs would serve more of the other's requests."""
    rates = {(M, "tp1"): (1.0,), (SMALL, "tp1"): (10.0,)}
    found = search(table(rates, {M: (5.0,), SMALL: (100.0,)}, offers(4)), Counter(), (M, SMALL))
    assert {column.model_id for column in found.counts} == {M, SMALL}
    assert sum(found.counts.values()) == 4


def test_gpus_move_between_models() -> None:
    """One is idle, the other short of replicas."""
    rates = {(M, "tp1"): (1.0,), (SMALL, "tp1"): (1.0,)}
    case = table(rates, {M: (0.1,), SMALL: (2.5,)}, offers(4))
    start = Counter(dict.fromkeys(case.columns, 2))
    found = search(case, start, (M, SMALL))
    assert {column.model_id: n for column, n in found.counts.items()} == {M: 1, SMALL: 3}


@pytest.mark.parametrize("lower", ["lp", "preflow"])
def test_policy_gives_a_whole_plan_again_and_again(lower: str) -> None:
    """Same problem, same plan; rows sum to 1; the plan it made is where it stays."""
    policy = OServePaper(MadeUpRates(), lower="preflow" if lower == "preflow" else "lp")
    case = problem({M: FOUR}, offers(16))
    planned = policy.plan(case)
    assert planned.plan is not None
    assert policy.plan(case) == planned
    assert "7.5 of 7.5 requests/s" in planned.reason
    assert set(planned.plan.weights) == {"*", "0", "1", "2", "3"}
    for row in planned.plan.weights.values():
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-9)
    again = policy.plan(replace(case, in_force=planned.plan)).plan
    assert again is not None
    assert again.replicas == planned.plan.replicas


def test_policy_switches_whenever_another_deployment_is_better() -> None:
    """By a hair, and whatever it costs: the paper has no test for it."""
    policy: Policy = OServePaper(MadeUpRates())
    case = problem({M: FOUR}, offers(16))
    first = policy.plan(case).plan
    assert first is not None
    worse = DeploymentPlan(plan_id="old", replicas=first.replicas[:1], weights={})
    moved = policy.plan(replace(case, in_force=worse)).plan
    assert moved is not None
    assert len(moved.replicas) > 1
    assert policy.period_s == 60.0
    assert policy.slow


@pytest.mark.parametrize("targets", [False, True])
def test_policy_plans_overload_without_demand_and_without_room(targets: bool) -> None:
    """No exception, and a reason that says what is missing."""
    policy = OServePaper(MadeUpRates(), targets=targets)
    heavy = policy.plan(problem({M: [(500.0, 600.0, 60.0), (1.0, 3e6, 3e6)]}, offers(16)))
    assert heavy.plan is not None
    assert "no shape on offer holds" in heavy.reason
    nothing = policy.plan(problem({M: []}, offers(8)))
    assert nothing.plan is not None
    assert policy.plan(problem({M: FOUR}, offers(1))).plan is None
    assert "fits no shape" in policy.plan(problem({M: FOUR}, offers(1))).reason
    assert policy.plan(problem({M: FOUR}, ())).plan is None
