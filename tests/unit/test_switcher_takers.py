"""Who takes whose requests over, and which way a switch goes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.switcher.takers import takeovers
from services.switcher.view import WorkerView
from services.switcher.way import way_to
from shared.hardware import GpuSpec
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import WorkerReport
from shared.placement.spread import target_of
from tests.unit.switcher_runs import SHAPE, hosted, plan, replica


def who(origin: DeploymentPlan, target: DeploymentPlan) -> list[tuple[str, str]]:
    """``sources>takers`` as names, one pair for each takeover."""
    return sorted(
        (
            " ".join(spec.replica_id for spec in takeover.sources),
            " ".join(spec.replica_id for spec in takeover.takers),
        )
        for takeover in takeovers(origin, target)
    )


ONES = [replica(f"r{i}", f"g{i}") for i in range(4)]


def test_requests_stay_on_the_gpus_on_which_they_are() -> None:
    """Otherwise KV cache would cross the mesh that could stay where it is."""
    pairs = plan("P", replica("a", "g0", "g1"), replica("b", "g2", "g3"))
    assert who(plan("O", *ONES), pairs) == [("r0 r1", "a"), ("r2 r3", "b")]


def test_replicas_are_joined_through_others() -> None:
    """Otherwise one replica's requests would be in two takeovers with different shares."""
    chain = plan("C", replica("a", "g0", "g1"), replica("b", "g2"))
    mixed = plan("M", replica("x", "g0"), replica("y", "g1", "g2"))
    assert who(chain, mixed) == [("a b", "x y")]


def test_without_a_near_successor_all_that_come_take_requests() -> None:
    """Otherwise requests of a replica that moves away would be lost."""
    moved = plan("M", replica("a", "g4"), replica("b", "g5"))
    assert who(plan("O", *ONES[:2]), moved) == [("r0 r1", "a b")]
    half = plan("H", replica("a", "g0"), replica("b", "g5"))
    assert who(plan("O", *ONES[:2]), half) == [("r0 r1", "a b")], "nobody comes onto g1"


def test_without_a_successor_those_that_stay_take_requests() -> None:
    """Otherwise fewer replicas would always mean requests computed again."""
    assert who(plan("O", *ONES), plan("F", *ONES[:2])) == [("r2 r3", "r0 r1")]


def test_what_comes_onto_free_gpus_alone_takes_nothing() -> None:
    """Otherwise adding a replica would pause those that serve."""
    assert who(plan("O", *ONES[:2]), plan("M", *ONES[:3])) == []


def test_models_are_kept_apart() -> None:
    """Otherwise one model would go on with the requests of another."""
    other = msgspec.structs.replace(replica("x", "g0"), model_id="other")
    kept = plan("T", other, ONES[1])
    assert who(plan("O", *ONES[:2]), kept) == [("r0", "r1")]


def test_shares_are_the_weights_of_those_who_take() -> None:
    """Otherwise the requests would not lie where the plan wants new ones to go."""
    target = DeploymentPlan(
        plan_id="T",
        replicas=(replica("a", "g0"), replica("b", "g1"), ONES[2]),
        weights={
            "*": {"a": 0.3, "b": 0.1, "r2": 0.6},
            "0": {"r2": 1.0},
            "1": {"b": 0.5, "r2": 0.5},
        },
    )
    joined = DeploymentPlan(plan_id="O", replicas=(replica("w", "g0", "g1"), ONES[2]))
    (takeover,) = takeovers(joined, target)
    rows = takeover.shares.rows
    assert rows["*"] == pytest.approx({"a": 0.75, "b": 0.25})
    assert rows["0"] == {"a": 0.5, "b": 0.5}, "none is named: alike"
    assert rows["1"] == {"b": 1.0}
    assert takeover.shares.leaders == {"a": "g0", "b": "g1"}


@st.composite
def plans(draw: st.DrawFn) -> DeploymentPlan:
    """Replicas of two models on six GPUs, some left free."""
    gpus = draw(st.permutations([f"g{i}" for i in range(6)]))
    specs: list[ReplicaSpec] = []
    while gpus and len(specs) < 4:
        size = draw(st.integers(1, min(3, len(gpus))))
        mine, gpus = gpus[:size], gpus[size:]
        model = draw(st.sampled_from(["m", "n"]))
        spec = replica(f"{model}-{'-'.join(mine)}", *mine)
        specs.append(msgspec.structs.replace(spec, model_id=model))
        if draw(st.booleans()):
            gpus = gpus[1:]
    ids = [spec.replica_id for spec in specs]
    row = dict(zip(ids, draw(st.lists(st.floats(0, 1), min_size=4, max_size=4)), strict=False))
    return DeploymentPlan(plan_id="p", replicas=tuple(specs), weights={"0": row})


@given(plans(), plans())
def test_every_request_has_one_taker_that_serves_its_model(
    origin: DeploymentPlan, target: DeploymentPlan
) -> None:
    """Otherwise a request would be taken over twice, by nobody, or by another model."""
    found = takeovers(origin, target)
    sources = [spec for takeover in found for spec in takeover.sources]
    takers = [spec for takeover in found for spec in takeover.takers]
    assert len({s.replica_id for s in sources}) == len(sources)
    assert len({s.replica_id for s in takers}) == len(takers)
    served = {spec.model_id for spec in target.replicas}
    going = {s for s in origin.replicas if s not in target.replicas and s.model_id in served}
    assert going == set(sources)
    for takeover in found:
        assert len({s.model_id for s in (*takeover.sources, *takeover.takers)}) == 1
        ids = {spec.replica_id for spec in takeover.takers}
        for request_type in (-1, 0, 7):
            assert target_of("request", request_type, takeover.shares.rows) in ids
        for row in takeover.shares.rows.values():
            assert set(row) <= ids
            assert sum(row.values()) == pytest.approx(1.0)


TWO = plan("TWO", *ONES[:2])
WIDE = plan("WIDE", replica("w", "g0", "g1"))


def mesh(*, live: bool = True, leaving: str = "", gpus: int = 4) -> WorkerView:
    view = WorkerView(worker_timeout_s=2.0, started_s=0.0)
    for number in range(gpus):
        view.on_report(
            WorkerReport(
                worker_id=f"g{number}",
                incarnation="i1",
                node_id="n0",
                gpu=GpuSpec(gpu_id=f"g{number}"),
                replicas=(hosted(f"r{number}", 1),),
                leaving=leaving == f"g{number}",
                peer="tcp://somewhere",
                shapes=(SHAPE,) if live else (),
            ),
            10.0,
        )
    return view


def way(view: WorkerView, origin: DeploymentPlan, target: DeploymentPlan) -> tuple[str, str]:
    return way_to(origin, target, view, 11.0)


def test_a_switch_is_live_where_nothing_is_against_it() -> None:
    """Otherwise every switch would cost a stop and a start."""
    assert way(mesh(), TWO, WIDE) == ("live", "")
    assert way(mesh(live=False), TWO, msgspec.structs.replace(TWO, plan_id="w")) == ("live", "")


def test_why_a_switch_is_not_live_is_said() -> None:
    """Otherwise an operator would not know why a switch interrupts requests."""
    again = plan("A", replica("r0", "g0", "g1"))
    other = msgspec.structs.replace(replica("x", "g0"), model_id="other")
    wide = plan("X", replica("w", "g0", "g1", "g2", "g3", "g4"))
    view = mesh()
    cases = {
        way(view, plan("none"), TWO): "nothing is in force that could be taken over",
        way(view, TWO, again): "r0 is in both plans, with another shape or on other GPUs",
        way(view, TWO, plan("O", other)): "no replica of m is left to take its requests over",
        way(view, TWO, wide): "w: tp = 5: use at most the 4 attention heads",
        way(mesh(live=False), TWO, WIDE): "g0 cannot move the weights of m",
        way(mesh(leaving="g1"), TWO, WIDE): "g1 is shutting down and lets its requests end",
    }
    for (found, why), expected in cases.items():
        assert (found, why) == ("reload", expected)
    assert len(cases) == 6


def test_a_worker_that_is_gone_keeps_nobody_from_a_live_switch() -> None:
    """Otherwise the loss of one GPU would interrupt the replicas of the others."""
    alone = mesh(gpus=1)
    assert way(alone, TWO, plan("ONE", replica("x", "g0"))) == ("live", "")
    deaf = mesh()
    deaf.on_report(
        WorkerReport(
            worker_id="g1",
            incarnation="i2",
            node_id="n0",
            gpu=GpuSpec(gpu_id="g1"),
            shapes=(SHAPE,),
        ),
        10.0,
    )
    assert way(deaf, TWO, WIDE) == ("reload", "other workers cannot reach g1")
