"""What may be planned: pools, columns, rates; and from counts to replicas and weights."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from services.scheduler.policies.capacity import Column, build, kind_of, pools, standing
from services.scheduler.policies.capacity_plan import (
    brief,
    even_shares,
    place_counts,
    spread,
    weights,
)
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.capacity_types import ARRIVALS_MIN
from services.scheduler.policies.costs import ANY_TARGET
from services.scheduler.policies.interface import GpuOffer, ModelDemand
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.slo import SloTarget
from tests.unit.joint_cases import EMPTY, MadeUpRates, offers, problem, table

M, SMALL = "llama-2-70b", "llama-3.1-8b"


def spec(replica_id: str, shape: str, *gpus: str) -> ReplicaSpec:
    return ReplicaSpec(replica_id=replica_id, model_id=M, parallelism=shape, gpus=gpus)


def test_gpus_that_serve_unlike_models_are_pools_of_their_own() -> None:
    """Else a replica might be planned onto a worker that has no such checkpoint."""
    gpus = (
        *offers(2),
        GpuOffer(gpu_id="x", node_id="h100-node0", kind="h100", models=(SMALL,)),
        *offers(1, kind="l40s"),
    )
    found = pools(gpus)
    assert {name: pool.node_gpus for name, pool in found.items()} == {
        "h100 for any": (2,),
        f"h100 for {SMALL}": (1,),
        "l40s": (1,),
    }
    built = build(problem({M: [(1, 100, 100)]}, gpus), MadeUpRates())
    assert all(column.pool == "h100 for any" for column in built.columns if column.model_id == M)


def test_only_shapes_that_fit_memory_and_gpus_are_columns() -> None:
    """70B in 16 bits is 138 GB: not one GPU, and not sixteen where there are eight."""
    built = build(problem({M: [(1, 100, 100)]}, offers(8)), MadeUpRates())
    shapes = {str(column.shape) for column in built.columns}
    assert "tp1pp1" not in shapes
    assert {"tp2pp1", "tp4pp1", "tp2pp2", "tp8pp1", "tp4pp2"} <= shapes
    assert not shapes & {"tp8pp2", "tp4pp4"}
    assert built.rates.all()


def test_rates_are_of_ones_own_types_only() -> None:
    """A replica of one model serves no other."""
    demand = {M: [(1.0, 100.0, 100.0)], SMALL: [(2.0, 50.0, 50.0)]}
    built = build(problem(demand, offers(8)), MadeUpRates())
    for column, row in zip(built.columns, built.rates, strict=True):
        assert [kind.model_id == column.model_id for kind in built.types] == list(row > 0)


def test_columns_that_serve_a_type_too_late_count_in_part_where_that_is_asked_for() -> None:
    """Replicas that stand would be taken for ones that serve nothing of it, and left at once."""
    target = SloTarget(ttft_s=0.6, tpot_s=0.1)
    case = problem({M: [(1, 100, 100), (1, 9_000, 100)]}, offers(8), target=target)
    source = MadeUpRates()
    strict, wide = build(case, source), build(case, source, late_share=0.5)
    late = strict.rates == 0.0
    assert 0 < late[:, 1].sum() < len(late)
    assert not late[:, 0].any()
    assert np.array_equal(wide.rates[~late], strict.rates[~late])
    for s in np.flatnonzero(late[:, 1]):
        whole = source.requests_per_s(
            kind_of(strict.columns[s], case, strict.pools), (9_000, 100), ANY_TARGET, case.limits
        )
        assert wide.rates[s, 1] == pytest.approx(0.5 * whole)
    assert wide.rates[late].any()


def test_types_that_meet_no_target_are_planned_for_all_the_same() -> None:
    """And it is said: a prompt of 30,000 tokens has no first token within a tenth of a second."""
    target = SloTarget(ttft_s=0.1, tpot_s=0.1)
    case = problem({M: [(1, 100, 100), (1, 30_000, 100)]}, offers(8), target=target)
    built = build(case, MadeUpRates())
    assert built.late == (1,)
    assert built.rates[:, 1].any()
    assert "type 1 (30000 tokens in, 100 out) within its targets" in built.shortcomings()


def test_what_cannot_be_served_is_named_with_the_reason() -> None:
    """A model that fits nothing, and a request that no KV cache holds."""
    built = build(problem({M: [(1, 100, 100)]}, offers(1)), MadeUpRates())
    assert built.shortcomings() == f"{M} fits no shape on the GPUs on offer"
    built = build(problem({M: [(1, 900_000, 900_000)]}, offers(2)), MadeUpRates())
    assert "no shape on offer holds" in built.shortcomings()
    assert built.servable() == ()


def test_without_demand_models_are_judged_by_nominal_lengths() -> None:
    """So that a first plan can be made before the first request."""
    built = build(problem({M: [], SMALL: []}, offers(8)), MadeUpRates())
    assert [(kind.model_id, kind.name) for kind in built.types] == [(M, "*"), (SMALL, "*")]
    assert built.rates.any()


def test_caution_adds_the_error_that_forecasts_have_had() -> None:
    """What is forecast badly is planned for with more room; what has no error yet, as is."""
    case = problem({M: [(2.0, 100.0, 100.0), (2.0, 100.0, 100.0)]}, offers(4))
    sure, unsure = case.models[0].types
    unsure = structs.replace(unsure, error_rps_mae=0.4)
    case = replace(case, models=(ModelDemand(model_id=M, types=(sure, unsure)),))
    assert list(build(case, MadeUpRates(), caution=1.25).demand) == [2.0, 2.5]
    assert list(build(case, MadeUpRates()).demand) == [2.0, 2.0]


def test_a_quantile_is_planned_for_where_the_forecast_has_it() -> None:
    """All tables of a problem have the same types, or their shares could not be compared."""
    case = problem({M: [(2.0, 100.0, 100.0)] * 3}, offers(4))
    both, lone, odd = case.models[0].types
    both = structs.replace(both, arrivals_rps_p10=0.0, arrivals_rps_p90=5.0)
    lone = structs.replace(lone, error_rps_mae=0.4)
    odd = structs.replace(odd, arrivals_rps_p90=float("nan"))
    case = replace(case, models=(ModelDemand(model_id=M, types=(both, lone, odd)),))
    high = build(case, MadeUpRates(), caution=1.25, quantile="p90")
    low = build(case, MadeUpRates(), caution=1.25, quantile="p10")
    assert list(high.demand) == [5.0, 2.5, 2.0]
    assert list(low.demand) == [ARRIVALS_MIN, 2.5, 2.0]
    assert np.array_equal(high.rates, low.rates)


def test_rates_are_within_the_targets_of_every_frequent_class() -> None:
    """A replica that answers a tenth of its requests too late does not serve them; a twentieth that
    asks for more does not make all the others pay for it."""
    case = problem({M: [(1.0, 2000.0, 100.0)] * 5}, offers(8))
    first, *others = case.models[0].types
    classes: list[dict[str, float]] = [
        {"interactive": 0.1, "standard": 0.9},
        {"interactive": 0.05, "standard": 0.95},
        {"batch": 1.0},
        {"unheard-of": 1.0},
    ]
    types = (
        first,
        *(structs.replace(k, class_shares=c) for k, c in zip(others, classes, strict=True)),
    )
    case = replace(case, models=(ModelDemand(model_id=M, types=types),))
    built = build(case, MadeUpRates())
    own, interactive, batch = (
        case.targets[M],
        case.class_targets["interactive"],
        case.class_targets["batch"],
    )
    assert [kind.target for kind in built.types] == [own, interactive, own, batch, own]
    assert built.types[1].class_shares == {"interactive": 0.1, "standard": 0.9}
    plain, strict, rarely, loose, unknown = built.rates.T
    assert np.array_equal(plain, rarely)
    assert np.array_equal(plain, unknown)
    assert np.all(strict <= plain)
    assert np.sum(strict < plain) > 1
    assert np.all(loose >= plain)
    assert np.any(loose > plain)
    aimed = build(case, MadeUpRates(), target=SloTarget(ttft_s=9.0, tpot_s=9.0))
    assert {kind.target.ttft_s for kind in aimed.types} == {9.0}


def test_targets_that_no_shape_meets_give_way_to_the_models_own_first() -> None:
    """Planning without any target where only the strictest is out of reach would give up more than
    has to be."""
    hurried = {"interactive": SloTarget(ttft_s=1e-3, tpot_s=0.05)}
    case = problem({M: [(1.0, 2000.0, 100.0)] * 2}, offers(8))
    first, second = case.models[0].types
    second = structs.replace(second, class_shares={"interactive": 1.0})
    case = replace(
        case,
        models=(ModelDemand(model_id=M, types=(first, second)),),
        class_targets=hurried,
    )
    built = build(case, MadeUpRates())
    assert built.late == (1,)
    assert np.array_equal(built.rates[:, 0], built.rates[:, 1])
    assert built.types[1].target == hurried["interactive"]


def test_even_shares_serve_what_can_be_served() -> None:
    """A type that a maximum flow leaves out entirely is routed all the same."""
    case = table({(M, "tp1"): (1.0, 0.5), (SMALL, "tp1"): (1.0,)}, {M: (3.0, 3.0)}, offers(2))
    large, _ = case.columns
    assert even_shares(case, {large: 1}) == pytest.approx(np.array([[1.0, 1.0], [0.0, 0.0]]))
    both = table({(M, "tp1"): (1.0, 0.0), (M, "tp2"): (0.0, 0.0)}, {M: (1.0, 1.0)}, offers(2))
    assert even_shares(both, {both.columns[0]: 1}) == pytest.approx(
        np.array([[1.0, 0.0], [0.0, 0.0]])
    )


def test_replicas_that_lost_a_gpu_do_not_stand() -> None:
    """They are gone, whatever the plan in force says."""
    plan = DeploymentPlan(
        plan_id="p",
        replicas=(
            spec("a", "tp2pp1", "h100-000", "h100-001"),
            spec("b", "tp2pp1", "h100-002", "gone"),
        ),
    )
    known = standing(plan, pools(offers(4)))
    assert known == Counter({Column(M, "h100", Parallelism(2)): 1})


def test_weights_are_the_shares_split_over_identical_replicas() -> None:
    """Rows sum to 1; "*" mixes the types by their demand."""
    case = table({(M, "tp1"): (1.0, 1.0), (M, "tp2"): (2.0, 2.0)}, {M: (3.0, 1.0)}, offers(4))
    small, large = case.columns
    placed = place_counts(case, {small: 2, large: 1}, EMPTY)
    rows = weights(case, placed, np.array([[0.5, 0.0], [0.5, 1.0]]))
    first, second, wide = (spec.replica_id for spec in placed.replicas)
    assert rows["0"] == pytest.approx({first: 0.25, second: 0.25, wide: 0.5})
    assert rows["1"] == pytest.approx({wide: 1.0})
    assert rows["*"] == pytest.approx({first: 0.1875, second: 0.1875, wide: 0.625})


def test_a_model_without_shares_treats_its_replicas_alike() -> None:
    """Nothing is expected of it; what comes is spread."""
    case = table({(M, "tp1"): (1.0,)}, {M: (1.0,)}, offers(2))
    placed = place_counts(case, {case.columns[0]: 2}, EMPTY)
    assert set(weights(case, placed, np.zeros((1, 1)))["*"].values()) == {0.5}


def test_brief_names_what_differs() -> None:
    """It stands in every reason."""
    one = Column(M, "h100", Parallelism(4))
    assert brief({one: 2, Column(M, "h100", Parallelism(2, 2)): 1}) == "1 x tp2pp2, 2 x tp4"
    assert (
        brief({one: 1, Column(M, "l40s", Parallelism(4)): 1}) == "1 x tp4 on h100, 1 x tp4 on l40s"
    )
    assert brief({}) == "nothing"


def test_spread_sends_every_request_somewhere() -> None:
    """A type of which half can be served is still routed whole."""
    assert spread(np.array([[0.2, 0.0], [0.3, 0.0]])) == pytest.approx(
        np.array([[0.4, 0.0], [0.6, 0.0]])
    )


def test_a_gpu_without_a_profile_offers_nothing() -> None:
    """It is a gap in what was measured, and no exception."""
    gpus = offers(8, kind="abacus")
    built = build(problem({M: [(1, 100, 100)]}, gpus), CostRates())
    assert built.columns == ()
    assert "fits no shape" in built.shortcomings()
