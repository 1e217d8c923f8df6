"""What a plan hangs on, on cases small enough to see it."""

import pytest

from services.scheduler.policies.capacity import Column, Pool, Table
from services.scheduler.policies.insight import Extension, bottlenecks, larger, one_more
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.joint import Goal, Terms, best_joint
from shared.hardware import Parallelism
from tests.unit.joint_cases import offers, table

M, OTHER = "llama-2-70b", "llama-3.1-8b"


def column(case: Table, shape: str, model_id: str = M) -> Column:
    (found,) = (
        each
        for each in case.columns
        if each.shape == Parallelism.parse(shape) and each.model_id == model_id
    )
    return found


def more(case: Table, goal: Goal, terms: Terms) -> Extension:
    best = best_joint(case, goal, terms, time_limit_s=10.0)
    (found,) = one_more(case, goal, terms, best, time_limit_s=50.0)
    return found


def test_the_model_that_runs_short_holds_the_bottleneck() -> None:
    """More GPUs for the other would be bought for nothing."""
    rates = {(M, "tp2"): (2.0,), (OTHER, "tp1"): (10.0,)}
    case = table(rates, {M: (1.0,), OTHER: (1.0,)}, offers(8))
    counts = {column(case, "tp2"): 2, column(case, "tp1", OTHER): 1}
    found = bottlenecks(case, counts)
    assert found.headroom == pytest.approx(4.0)
    assert found.types == {(M, "0"): pytest.approx(1.0)}
    assert found.narrowest is not None
    assert found.narrowest.column == column(case, "tp2")
    assert found.narrowest.headroom == pytest.approx(2.0)
    assert found.narrowest.headroom_per_gpu == pytest.approx(1.0)
    assert found.narrowest.requests_per_s == pytest.approx(4.0)
    idle = next(w for w in found.columns if w.column.model_id == OTHER)
    assert idle.headroom == pytest.approx(0.0)
    assert (
        "the bottleneck is 2 x llama-2-70b tp2: one more would carry at most 2 times"
        in found.in_words()
    )
    assert "type 0 of llama-2-70b takes 100% of the capacity" in found.in_words()


def test_shapes_that_the_plan_lacks_are_valued_too() -> None:
    """The best next replica may be of another shape than all that there are."""
    case = table({(M, "tp1"): (1.0,), (M, "tp2"): (5.0,)}, {M: (2.0,)}, offers(8))
    found = bottlenecks(case, {column(case, "tp1"): 4})
    best = found.columns[0]
    assert (best.column, best.count) == (column(case, "tp2"), 0)
    assert best.headroom == pytest.approx(2.5)
    assert found.narrowest is not None
    assert found.narrowest.column == column(case, "tp1")


def test_a_type_that_nothing_serves_is_named() -> None:
    """It is the bottleneck, and no replica in use is."""
    case = table({(M, "tp1"): (1.0, 0.0), (M, "tp4"): (0.0, 3.0)}, {M: (1.0, 1.0)}, offers(8))
    found = bottlenecks(case, {column(case, "tp1"): 4})
    assert found.headroom == 0.0
    assert found.in_words() == f"no replica serves type 1 of {M}"
    assert "nothing is expected" in bottlenecks(case.only([]), {}).in_words()


def test_one_more_gpu_may_bring_nothing_where_shapes_are_large() -> None:
    """The fewest that bring anything are those of the next replica."""
    case = table({(M, "tp4"): (1.0,)}, {M: (1.0,)}, offers(8))
    found = more(case, "headroom", Terms())
    assert not found.one.brings
    assert found.least is not None
    assert found.least.gpus == 4
    assert found.least.objective == pytest.approx(3.0)
    assert found.node.objective == pytest.approx(4.0)
    assert found.in_words() == (
        "h100: one more GPU would bring nothing; 4 more GPUs would take it from 2 to 3 times the "
        "demand (+50.0%), with 1 x tp4 more; 8 more GPUs would take it from 2 to 4 times the "
        "demand (+100.0%), with 2 x tp4 more"
    )


def test_one_more_gpu_may_change_the_shapes() -> None:
    """A node that is whole again holds a large replica, which is worth more than eight small."""
    rates = {(M, "tp1"): (1.0,), (M, "tp8"): (20.0,)}
    found = more(table(rates, {M: (1.0,)}, offers(7)), "headroom", Terms())
    assert found.one.objective == pytest.approx(20.0)
    assert found.node.gpus == 8
    assert "with 1 x tp8 instead of 7 x tp1" in found.in_words()


def test_a_node_that_lost_a_gpu_is_completed_first() -> None:
    """That is where the next GPU would be put, and a shape of four needs it there."""
    case = table({(M, "tp4"): (1.0,)}, {M: (1.0,)}, offers(7, per_node=4))
    found = more(case, "headroom", Terms())
    assert found.one.brings
    assert found.one.objective == pytest.approx(2.0)
    assert found.in_words().startswith("h100: one more GPU would take it from 1 to 2 times")


def test_what_is_not_the_bottleneck_brings_nothing() -> None:
    """The operator should not buy it."""
    case = table({(M, "tp1"): (1.0,)}, {M: (1.0,)}, offers(2))
    found = more(case, "thrift", Terms())
    assert found.least is None
    assert found.in_words() == "2 more GPUs of h100 would bring nothing"


def test_gpus_may_make_a_plan_possible() -> None:
    """What is missing is said in GPUs."""
    case = table({(M, "tp1"): (1.0,)}, {M: (3.5,)}, offers(2))
    found = more(case, "thrift", Terms())
    assert found.before is None
    assert found.least is not None
    assert found.least.gpus == 2
    assert "2 more GPUs would make a plan possible, of 4 per hour" in found.in_words()


def test_new_nodes_are_as_large_as_the_largest() -> None:
    """GPUs come in machines like those that there are."""

    def grown(nodes: tuple[int, ...], gpus: int) -> tuple[int, ...]:
        gpu = GpuOffer(gpu_id="g", node_id="n", kind="k")
        return larger(
            Pool(name="k", kind="k", models=(), offers=(gpu,), node_gpus=nodes), gpus
        ).node_gpus

    assert grown((8, 7, 3), 1) == (8, 8, 3)
    assert grown((8, 7, 3), 3) == (8, 8, 5)
    assert grown((4, 4), 6) == (4, 4, 4, 2)
    assert grown((2,), 0) == (2,)
    assert grown((7, 7), 2) == (8, 8)
