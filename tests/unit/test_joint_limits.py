"""Joint plans with minimums, losses and prices worked out by hand, and what is left when time is
up."""

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from services.scheduler.policies import joint
from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.joint import Goal, Solution, Terms, best_joint, verify_solution
from shared.hardware import Parallelism
from tests.property.test_joint_exact import scaled, table_of
from tests.unit.joint_cases import offers, table

M, OTHER = "llama-2-70b", "llama-3.1-8b"
NODES: dict[str, tuple[int, ...]] = {"a100": (8,) * 4, "h100": (8,) * 4}


def solved(case: Table, goal: Goal, terms: Terms) -> Solution:
    found = best_joint(case, goal, terms, time_limit_s=30.0)
    assert found is not None
    assert found.optimal
    return found


def shapes(solution: Solution) -> dict[str, int]:
    return {f"{c.model_id} {c.shape}": n for c, n in solution.counts.items()}


def test_to_survive_a_loss_small_replicas_are_better_than_large_ones() -> None:
    """One of two large replicas takes half of all with it, one of eight small ones an eighth."""
    case = table({(M, "tp1"): (1.0,), (M, "tp4"): (5.0,)}, {M: (1.0,)}, offers(8))
    assert shapes(solved(case, "headroom", Terms())) == {f"{M} tp4pp1": 2}
    found = solved(case, "headroom", Terms(survive=1))
    assert shapes(found) == {f"{M} tp1pp1": 8}
    assert found.objective == pytest.approx(7.0)
    assert found.shares.sum() == pytest.approx(7.0)


def test_one_replica_survives_nothing() -> None:
    """Its headroom after a loss is 0, and no plan of one carries the demand."""
    case = table({(M, "tp4"): (5.0,)}, {M: (1.0,)}, offers(4))
    assert solved(case, "headroom", Terms(survive=1)).objective == 0.0
    assert best_joint(case, "thrift", Terms(survive=1), time_limit_s=10.0) is None


def test_each_model_survives_its_own_losses() -> None:
    """One spare for all would be of no use to the model that has none of it."""
    rates = {(M, "tp1"): (1.0,), (OTHER, "tp1"): (1.0,)}
    case = table(rates, {M: (2.0,), OTHER: (1.0,)}, offers(8))
    found = solved(case, "thrift", Terms(survive=1))
    assert shapes(found) == {f"{M} tp1pp1": 3, f"{OTHER} tp1pp1": 2}


def test_after_a_loss_replicas_may_be_full() -> None:
    """Two thirds of load with all three are a full load for two: no fourth is paid for."""
    case = table({(M, "tp1"): (1.0,)}, {M: (2.0,)}, offers(8))
    assert solved(case, "thrift", Terms(load=0.7)).objective == pytest.approx(3.0)
    assert solved(case, "thrift", Terms(load=0.7, survive=1)).objective == pytest.approx(3.0)
    assert solved(case, "thrift", Terms(load=0.5, survive=1)).objective == pytest.approx(4.0)


def test_gentle_plans_survive_too() -> None:
    """What answers soonest is one large replica, which five GPUs leave no room to lose."""
    case = table({(M, "tp1"): (1.0,), (M, "tp4"): (3.0,)}, {M: (2.0,)}, offers(5))
    cost = np.array([[1.0], [0.2]])
    found = solved(case, "gentle", Terms(load=0.9, cost=cost))
    assert found.objective == pytest.approx(0.2)
    assert shapes(found)[f"{M} tp4pp1"] == 1
    found = solved(case, "gentle", Terms(load=0.9, cost=cost, survive=1))
    assert found.objective == pytest.approx(1.0)
    assert shapes(found)[f"{M} tp1pp1"] >= 3


def test_the_cheapest_kind_that_carries_the_load_is_taken() -> None:
    """Two slow GPUs at a third of the price each cost less than one quick one."""
    gpus = (*offers(4, kind="a100"), *offers(4, kind="h100"))
    nodes = {"a100": (4,), "h100": (4,)}
    case = table_of(np.random.default_rng(0), nodes, ("tp1",))
    assert len(gpus) == case.gpus()
    cheap, quick = (
        [s for s, column in enumerate(case.columns) if column.pool == kind]
        for kind in ("a100", "h100")
    )
    rates = np.where(case.rates >= 0, 0.0, 0.0)
    for s, column in enumerate(case.columns):
        for j, kind in enumerate(case.types):
            if kind.model_id == column.model_id:
                rates[s, j] = 1.0 if s in cheap else 2.0
    total = float(case.demand.sum())
    case = _with(case, rates * total)
    found = solved(case, "thrift", Terms(prices={"a100": 1.0, "h100": 3.0}))
    assert {case.columns.index(column) for column in found.counts} <= set(cheap)
    found = solved(case, "thrift", Terms(prices={"a100": 4.0, "h100": 3.0}))
    assert {case.columns.index(column) for column in found.counts} <= set(quick)


def _with(case: Table, rates: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Table:
    return Table(pools=case.pools, columns=case.columns, types=case.types, rates=rates)


def test_minimums_are_by_model_and_may_be_nothing() -> None:
    """Three replicas of a model of which nothing is expected, or none, as is asked."""
    case = table({(M, "tp1"): (1.0,), (OTHER, "tp2"): ()}, {M: (1.0,), OTHER: ()}, offers(8))
    assert shapes(solved(case, "thrift", Terms(least={OTHER: 3}))) == {
        f"{M} tp1pp1": 1,
        f"{OTHER} tp2pp1": 3,
    }
    assert shapes(solved(case, "thrift", Terms(least={OTHER: 0}))) == {f"{M} tp1pp1": 1}
    assert Terms(wanted=(M,), least={M: 0, OTHER: 0}).replicas_min() == {M: 1}
    assert best_joint(case, "thrift", Terms(least={OTHER: 4}), time_limit_s=10.0) is None
    without = case.only([])
    assert solved(without, "thrift", Terms(least={M: 0})).counts == {}


def test_a_type_that_hardly_comes_is_served_all_the_same() -> None:
    """It takes less of a replica than the solver's tolerance, but its requests wait for an
    answer."""
    case = table({(M, "tp1"): (9.0, 0.0), (M, "tp4"): (1.0, 1e6)}, {M: (1.0, 1e-6)}, offers(8))
    for goal in ("headroom", "thrift"):
        assert f"{M} tp4pp1" in shapes(solved(case, goal, Terms()))


def hard(goal: Goal) -> tuple[Table, Terms]:
    """A case whose optimum is not found at the root of the search."""
    case = table_of(np.random.default_rng(17), NODES, ("tp1", "tp2", "tp4", "tp2pp2", "tp8"))
    load = {"headroom": 1.0, "thrift": 0.8, "served": 1.0}[goal]
    models = {column.model_id for column in case.columns}
    return case, Terms(wanted=tuple(sorted(models)), load=load)


def test_a_search_cut_short_gives_its_best_plan_and_says_how_far_it_may_be_off() -> None:
    """A bound that came with it would otherwise be taken for a proof, or the plan be thrown
    away."""
    case, terms = hard("headroom")
    best = solved(case, "headroom", terms)
    short = best_joint(case, "headroom", terms, time_limit_s=30.0, nodes_max=1)
    assert short is not None
    assert not short.optimal
    assert short.gap > joint.GAP_MAX
    assert short.objective <= best.bound * (1 + 1e-9)
    assert short.bound >= best.objective * (1 - 1e-9)


@pytest.mark.parametrize("goal", ["headroom", "thrift", "served"])
@pytest.mark.parametrize("survive", [0, 1])
def test_without_any_plan_of_the_solver_the_relaxation_is_rounded(
    goal: Goal, survive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plan would mean that the GPUs idle because a solver was slow."""
    case, terms = hard(goal)
    if goal == "served":
        survive = 0
    terms = Terms(wanted=terms.wanted, load=terms.load, survive=survive)
    if goal == "thrift":
        most = solved(case, "headroom", terms).objective
        case = scaled(case, 0.4 * most)
    best = solved(case, goal, terms)
    real = joint.milp

    def late(*args: object, **options: object) -> OptimizeResult:
        integrality = options["integrality"]
        if not np.any(np.asarray(integrality)):
            return real(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]  # as given
        return OptimizeResult({"status": 1, "x": None, "fun": None, "mip_dual_bound": -np.inf})  # pyright: ignore[reportCallIssue]  # it is a dict

    monkeypatch.setattr(joint, "milp", late)
    rounded = best_joint(case, goal, terms, time_limit_s=1.0)
    assert rounded is not None
    assert np.isfinite(rounded.bound)
    assert rounded.gap < 0.5
    if goal == "thrift":
        assert rounded.bound <= best.objective * (1 + 1e-9)
        assert rounded.objective >= best.bound * (1 - 1e-9)
    else:
        assert rounded.bound >= best.objective * (1 - 1e-9)
        assert rounded.objective <= best.bound * (1 + 1e-9)


def test_the_last_round_has_every_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding them one by one would go on for ever, or end with a plan that is not proven."""
    sizes = ("tp1", "tp2", "tp4", "tp8")
    case, terms = table_of(np.random.default_rng(3), {"h100": (8, 8)}, sizes), Terms(survive=1)
    best = solved(case, "headroom", terms)
    monkeypatch.setattr(joint, "ROUNDS_MAX", 2)
    assert solved(case, "headroom", terms).objective == pytest.approx(best.objective, rel=2e-4)


def test_no_time_at_all_still_gives_a_plan() -> None:
    """HiGHS itself then has none."""
    case, terms = hard("headroom")
    found = best_joint(case, "headroom", terms, time_limit_s=0.0)
    assert found is not None
    assert found.objective > 0.0
    assert found.objective <= found.bound


def test_terms_that_no_plan_keeps_are_no_plan_however_little_time_there_is() -> None:
    """The relaxation tells that already."""
    case = table({(M, "tp4"): (1.0,)}, {M: (5.0,)}, offers(8))
    assert best_joint(case, "thrift", Terms(), time_limit_s=0.0) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"counts": {"tp1": 9}}, "no 1 GPUs left"),
        ({"counts": {"tp1": 0}}, "no number of replicas"),
        ({"counts": {"tp1": 3}}, "is used 4 times of 3"),
        ({"objective": 3.0}, "sum to 4, not to 3"),
        ({"bound": 3.9}, "better than its bound"),
        ({"shares": [[-1.0], [5.0]]}, "which it cannot serve"),
    ],
)
def test_verify_finds_what_a_program_got_wrong(change: dict[str, object], complaint: str) -> None:
    """It is the last word before a plan is made of it."""
    case = table({(M, "tp1"): (1.0,), (M, "tp2"): (1.5,)}, {M: (1.0,)}, offers(4))
    named = {str(column.shape).removesuffix("pp1"): column for column in case.columns}
    fields: dict[str, object] = {"objective": 4.0, "bound": 4.0, "shares": [[4.0], [0.0]]}
    fields |= {"counts": {"tp1": 4}} | change
    counts = fields["counts"]
    assert isinstance(counts, dict)
    solution = Solution(
        goal="headroom",
        counts={named[str(name)]: int(str(count)) for name, count in counts.items()},  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # as above
        shares=np.array(fields["shares"]),
        objective=float(str(fields["objective"])),
        bound=float(str(fields["bound"])),
    )
    wrong = verify_solution(case, Terms(), solution)
    assert any(complaint in line for line in wrong), wrong


def test_verify_tries_every_loss_and_every_term() -> None:
    """A plan that stands as long as nothing fails is not what was asked for."""
    case = table({(M, "tp1"): (1.0,), (M, "tp4"): (3.0,)}, {M: (1.0,)}, offers(8))
    (large,) = (column for column in case.columns if column.shape.tp == 4)
    best = solved(case, "headroom", Terms(floor={large: 1}))
    assert verify_solution(case, Terms(floor={large: 1}), best) == []
    assert "are given" in verify_solution(case, Terms(floor={large: 2}), best)[0]
    assert "of 9" in verify_solution(case, Terms(least={M: 9}), best)[0]
    survives = verify_solution(case, Terms(survive=1), best)
    assert any("without one" in line for line in survives)
    odd = Column(M, next(iter(case.pools)), Parallelism(3, 1))
    unknown = Solution(
        goal="headroom", counts={odd: 1}, shares=best.shares, objective=1.0, bound=1.0
    )
    assert "no number of replicas" in verify_solution(case, Terms(), unknown)[0]


def test_gpus_of_a_pool_are_not_those_of_another() -> None:
    """Two nodes of four of unlike kinds hold no replica of eight."""
    gpus = (*(GpuOffer(gpu_id=f"a{i}", node_id="a", kind="a100") for i in range(4)),)
    case = table({(M, "tp4"): (1.0,), (M, "tp4pp2"): (9.0,)}, {M: (1.0,)}, gpus)
    assert shapes(solved(case, "headroom", Terms())) == {f"{M} tp4pp1": 1}
