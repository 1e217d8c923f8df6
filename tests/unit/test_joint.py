"""The joint program against plans worked out by hand and by trying all of them."""

from collections import Counter
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest

from services.scheduler.policies.capacity import Column, Pool, Table
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.joint import GAP_MAX, Solution, Terms, best_joint, verify
from shared.hardware import Parallelism
from tests.unit.joint_cases import offers, table

M = "llama-2-70b"


def solved(case: Table, goal: str = "headroom", **terms: object) -> Solution:
    assert goal in {"headroom", "gentle", "served"}
    found = best_joint(case, goal, Terms(**terms), time_limit_s=30.0)  # pyright: ignore[reportArgumentType]  # by name
    assert found is not None
    return found


def shapes(solution: Solution) -> dict[str, int]:
    return {f"{c.model_id} {c.shape}": n for c, n in solution.counts.items()}


def every_plan(case: Table, models: tuple[str, ...]) -> Iterator[Counter[Column]]:
    """All counts that fit the GPUs, by plain enumeration."""

    def extend(columns: tuple[Column, ...], left: int) -> Iterator[Counter[Column]]:
        if not columns:
            yield Counter()
            return
        for n in count():
            if n * columns[0].shape.gpus > left:
                return
            for rest in extend(columns[1:], left - n * columns[0].shape.gpus):
                yield rest + Counter({columns[0]: n})

    for counts in extend(case.columns, case.gpus()):
        if not verify(case, counts, wanted=models):
            yield counts


def test_two_types_get_the_two_shapes_that_suit_them() -> None:
    """Short work on four small replicas, long work on a large one: no uniform plan does as well."""
    case = table(
        {(M, "tp1"): (4.0, 0.1), (M, "tp4"): (8.0, 4.0)}, {M: (16.0, 4.0)}, offers(8)
    )  # fmt: skip
    found = solved(case, wanted=(M,))
    assert shapes(found) == {f"{M} tp1pp1": 4, f"{M} tp4pp1": 1}
    assert found.objective == pytest.approx(1.0)
    assert found.optimal
    assert found.bound == pytest.approx(found.objective, rel=2 * GAP_MAX)
    assert found.shares.sum(axis=0) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_on_eight_gpus_has_more_headroom(seed: int) -> None:
    """Every plan is tried; also those on one node of 8, two of 4, and one with a GPU missing."""
    draw = np.random.default_rng(seed)
    gpus = [offers(8), offers(8, per_node=4), offers(7)][seed % 3]
    sizes = {"tp1": 1, "tp2": 2, "tp1pp2": 2, "tp4": 4, "tp2pp2": 4}
    models = (M,) if seed % 2 else (M, "llama-3.1-8b")
    rates = {
        (model_id, shape): tuple(draw.uniform(0.5, 2.0, 3) * size ** draw.uniform(0.8, 1.3))
        for model_id in models
        for shape, size in sizes.items()
    }
    demand = {model_id: tuple(draw.uniform(0.2, 3.0, 3)) for model_id in models}
    case = table(rates, demand, gpus)
    best = 0.0
    for counts in every_plan(case, models):
        flow = best_flow(case.instance(counts), "headroom")
        assert flow is not None
        best = max(best, flow.headroom)
    found = solved(case, wanted=models)
    assert best > 0
    assert found.objective == pytest.approx(best, rel=2 * GAP_MAX)


def test_a_replica_never_straddles_nodes_with_its_tensor_ranks() -> None:
    """Two nodes of 3 GPUs hold two replicas of 2, not three, though 6 GPUs would be enough."""
    case = table({(M, "tp2"): (1.0,)}, {M: (1.0,)}, offers(6, per_node=3))
    assert solved(case, wanted=(M,)).objective == pytest.approx(2.0)


def test_a_pipeline_may_straddle_nodes() -> None:
    """Its stages pass activations once, so that a model that fits no node is served at all."""
    case = table({(M, "tp4pp2"): (1.0,)}, {M: (1.0,)}, offers(8, per_node=4))
    assert shapes(solved(case, wanted=(M,))) == {f"{M} tp4pp2": 1}


def test_every_wanted_model_gets_a_replica() -> None:
    """A model of which nothing is expected must still answer."""
    rates = {(M, "tp1"): (1.0,), ("llama-3.1-8b", "tp1"): ()}
    case = table(rates, {M: (1.0,), "llama-3.1-8b": ()}, offers(4))
    assert solved(case, wanted=(M,)).objective == pytest.approx(4.0)
    both = solved(case, wanted=(M, "llama-3.1-8b"))
    assert both.objective == pytest.approx(3.0)
    assert shapes(both)["llama-3.1-8b tp1pp1"] == 1


def test_too_few_gpus_for_every_model_is_no_plan() -> None:
    """The caller then asks for less; the program does not bend its own rules."""
    rates = {(M, "tp4"): (1.0,), ("llama-3.1-8b", "tp1"): (1.0,)}
    case = table(rates, {M: (1.0,), "llama-3.1-8b": (1.0,)}, offers(4))
    both = Terms(wanted=(M, "llama-3.1-8b"))
    assert best_joint(case, "headroom", both, time_limit_s=10.0) is None
    found = solved(case, "served")
    assert found.objective == pytest.approx(1.0)


def test_gentle_prefers_the_cheap_shape_as_long_as_it_carries_the_load() -> None:
    """Two large replicas answer sooner; at twice the demand only the eight small ones carry it."""
    rates = {(M, "tp1"): (1.0,), (M, "tp4"): (3.0,)}
    cost = np.array([[1.0], [0.2]])
    light = solved(table(rates, {M: (4.0,)}, offers(8)), "gentle", wanted=(M,), load=0.9, cost=cost)
    assert shapes(light) == {f"{M} tp4pp1": 2}
    assert light.objective == pytest.approx(0.2)
    full = solved(table(rates, {M: (7.0,)}, offers(8)), "gentle", wanted=(M,), load=0.9, cost=cost)
    assert shapes(full) == {f"{M} tp1pp1": 8}
    heavy = table(rates, {M: (9.0,)}, offers(8))
    terms = Terms(wanted=(M,), load=0.9, cost=cost)
    assert best_joint(heavy, "gentle", terms, time_limit_s=10.0) is None


def test_a_floor_is_built_upon() -> None:
    """What is left is filled with what carries most."""
    case = table({(M, "tp1"): (1.0,), (M, "tp4"): (3.0,)}, {M: (1.0,)}, offers(8))
    large = next(column for column in case.columns if column.shape.tp == 4)
    assert shapes(solved(case, floor={large: 1})) == {f"{M} tp4pp1": 1, f"{M} tp1pp1": 4}


def test_shapes_in_force_that_are_never_planned_are_not_chosen() -> None:
    """An operator's tp3 may stay, but no plan asks for one: it would break the packing."""
    case = table({(M, "tp3"): (9.0,), (M, "tp1"): (1.0,)}, {M: (1.0,)}, offers(6))
    assert shapes(solved(case, wanted=(M,))) == {f"{M} tp1pp1": 6}


def test_nothing_to_choose_from_is_no_plan() -> None:
    """Not an exception."""
    empty = table({}, {M: (1.0,)}, offers(2))
    assert best_joint(empty, "headroom", Terms(), time_limit_s=1.0) is None


def test_verify_does_not_trust_the_program() -> None:
    """It places replicas itself."""
    case = table({(M, "tp2"): (1.0,)}, {M: (1.0,)}, offers(6, per_node=3))
    (column,) = case.columns
    assert not verify(case, {column: 2}, wanted=(M,))
    assert "no 2 GPUs left" in verify(case, {column: 3}, wanted=())[0]
    assert verify(case, {}, wanted=(M,)) == [f"{M} has no replica"]


def test_a_pool_knows_what_a_replica_needs_of_a_node() -> None:
    """On nodes of 4, eight ranks in two stages are two groups of four."""
    gpus = tuple(GpuOffer(gpu_id=f"g{i}", node_id=f"n{i // 4}", kind="k") for i in range(8))
    pool = Pool(name="k", kind="k", models=(), offers=gpus, node_gpus=(4, 4))
    assert pool.unit(Parallelism(4, 2)) == (4, 2)
    assert pool.unit(Parallelism(2, 2)) == (4, 1)
    assert pool.fits(Parallelism(4, 2))
    assert not pool.fits(Parallelism(8, 1))
