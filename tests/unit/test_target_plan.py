"""From shapes that a person writes to a plan in which least has to move."""

import pytest

from loadgen.planning.target import Counts, offers_of, read_shapes, target_plan, which_model
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.verify import verify
from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec, Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import WorkerReport


def spec(replica_id: str, shape: str, *gpus: str, model_id: str = "m") -> ReplicaSpec:
    parallelism = str(Parallelism.parse(shape))
    return ReplicaSpec(replica_id=replica_id, model_id=model_id, parallelism=parallelism, gpus=gpus)


def in_force(*specs: ReplicaSpec, **rows: dict[str, float]) -> DeploymentPlan:
    return DeploymentPlan(plan_id="plan-before", replicas=specs, weights=rows)


def offers(*nodes: int, kind: str = "cpu", models: tuple[str, ...] = ()) -> list[GpuOffer]:
    return [
        GpuOffer(gpu_id=f"n{node}-g{gpu}", node_id=f"n{node}", kind=kind, models=models)
        for node, gpus in enumerate(nodes)
        for gpu in range(gpus)
    ]


def planned(to: str, before: DeploymentPlan, *nodes: int, epoch: int = 4) -> DeploymentPlan:
    """The plan for ``m``, which the scheduler would not refuse."""
    there = offers(*nodes)
    plan = target_plan(read_shapes(to), "m", offers=there, in_force=before, epoch=epoch)
    assert verify(plan, there, {"m", "other"}) == []
    return plan


def where(plan: DeploymentPlan) -> set[tuple[str, tuple[str, ...]]]:
    return {(one.parallelism, one.gpus) for one in plan.replicas}


TWO = in_force(spec("r0", "tp1", "n0-g0"), spec("r1", "tp1", "n0-g1"))
FOUR = in_force(*(spec(f"r{i}", "tp1", f"n0-g{i}") for i in range(4)))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("tp2*1", {Parallelism(2, 1): 1}),
        ("tp2", {Parallelism(2, 1): 1}),
        ("tp2pp1*1, tp1*2", {Parallelism(2, 1): 1, Parallelism(1, 1): 2}),
        ("tp1*2,tp1", {Parallelism(1, 1): 3}),
    ],
)
def test_shapes_are_read(text: str, counts: Counts) -> None:
    """Other shapes would come, or another number of them, than were asked for."""
    assert read_shapes(text) == counts


@pytest.mark.parametrize(
    "text", ["", "2", "tp", "tp0*1", "tp2*0", "tp2*-1", "tp1,", "pp2", "tp2x1"]
)
def test_bad_shapes_name_the_option_and_what_to_write(text: str) -> None:
    """A person would look for a mistake in the mesh."""
    with pytest.raises(ConfigInvalid, match=r"--to = .*: (write|ask)"):
        read_shapes(text)


def test_merged_replicas_go_where_their_parts_are() -> None:
    """Weights would cross links that lie there already."""
    plan = planned("tp2*1", TWO, 4)
    assert where(plan) == {("tp2pp1", ("n0-g0", "n0-g1"))}
    assert where(planned("tp2*1", in_force(*FOUR.replicas[2:]), 4)) == {
        ("tp2pp1", ("n0-g2", "n0-g3"))
    }
    across = in_force(spec("r0", "tp1", "n0-g0"), spec("r1", "tp1", "n1-g0"))
    ((_, gpus),) = where(planned("tp2*1", across, 2, 2))
    assert {gpu.partition("-")[0] for gpu in gpus} in ({"n0"}, {"n1"}), "one node"


def test_what_has_its_shape_stays() -> None:
    """Seven of eight replicas would stand still for a change of one."""
    plan = planned("tp2*1,tp1*2", FOUR, 4)
    assert {("r0", ("n0-g0",)), ("r1", ("n0-g1",))} <= {
        (one.replica_id, one.gpus) for one in plan.replicas
    }
    assert ("tp2pp1", ("n0-g2", "n0-g3")) in where(plan)
    mixed = in_force(
        spec("a", "tp1", "n0-g0"), spec("b", "tp1", "n1-g0"), spec("c", "tp1", "n1-g1")
    )
    assert where(planned("tp2*1,tp1*1", mixed, 1, 2)) == {
        ("tp1pp1", ("n0-g0",)),
        ("tp2pp1", ("n1-g0", "n1-g1")),
    }, "those stay that leave a whole node to the others"


def test_a_replica_moves_out_of_the_way_if_nothing_else_will_do() -> None:
    """A target that fits would be refused for where replicas happen to be."""
    before = in_force(spec("a", "tp1", "n0-g0"), spec("b", "tp1", "n1-g0"))
    plan = planned("tp2*1,tp1*2", before, 2, 2)
    assert sorted(shape for shape, _ in where(plan)) == ["tp1pp1", "tp1pp1", "tp2pp1"]
    assert len({one.replica_id for one in plan.replicas} & {"a", "b"}) == 1


def test_a_pipeline_spans_nodes_where_it_must() -> None:
    """A shape that fits would be refused."""
    plan = planned("tp1pp2*1", in_force(spec("a", "tp1", "n0-g0")), 1, 1)
    assert where(plan) == {("tp1pp2", ("n0-g0", "n1-g0"))}


def test_the_same_gpus_in_another_shape_keep_their_order() -> None:
    """Each rank of a tp2 that becomes pp2 has half of what it needs, whatever the order; another
    order would cost nothing today and half the bytes in the switch back."""
    before = in_force(spec("a", "tp2", "n0-g0", "n0-g1"))
    assert where(planned("tp1pp2", before, 2)) == {("tp1pp2", ("n0-g0", "n0-g1"))}


def test_ids_are_never_given_twice() -> None:
    """Commands and words of a replica that is gone would count for another."""
    first = planned("tp2*1", TWO, 4)
    assert planned("tp2*1", TWO, 4) == first, "the same question has the same answer"
    back = planned("tp1*2", first, 4, epoch=5)
    again = planned("tp2*1", back, 4, epoch=6)
    elsewhere = planned("tp2*1", in_force(), 4)
    ids = [
        {one.replica_id for one in plan.replicas} for plan in (TWO, first, back, again, elsewhere)
    ]
    assert not ids[1] & ids[3]
    assert not ids[0] & ids[2]
    there = offers(4)
    (taken,) = first.replicas
    other = target_plan(
        read_shapes("tp2"), "m", offers=there, in_force=TWO, epoch=4, taken={taken.replica_id}
    )
    assert other.replicas[0].replica_id != taken.replica_id


def test_gpus_get_equal_shares() -> None:
    """The single-GPU replica would get as much as the one of two."""
    plan = planned("tp2*1,tp1*2", FOUR, 4)
    shares = {one.parallelism: plan.weights["*"][one.replica_id] for one in plan.replicas}
    assert shares == {"tp2pp1": pytest.approx(0.5), "tp1pp1": pytest.approx(0.25)}


def test_other_models_are_left_alone() -> None:
    """A switch of one model would take the other's GPUs, or its routing."""
    other = spec("x0", "tp1", "n0-g2", model_id="other")
    also = spec("x1", "tp1", "n0-g3", model_id="other")
    before = DeploymentPlan(
        plan_id="p",
        replicas=(*TWO.replicas, other, also),
        weights={"*": {"r0": 0.25, "r1": 0.25, "x0": 0.4, "x1": 0.1}, "0": {"x0": 0.5, "r0": 0.5}},
    )
    plan = planned("tp2*1", before, 5)
    assert {other, also} <= set(plan.replicas)
    row = plan.weights["*"]
    assert (row["x0"], row["x1"]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert plan.weights["0"]["x0"] == pytest.approx(0.5)
    with pytest.raises(ConfigInvalid, match="needs 4 GPUs, 3 are there for m: ask for fewer"):
        planned("tp4*1", before, 5)


def test_no_room_says_why() -> None:
    """A person would try the same again."""
    with pytest.raises(ConfigInvalid, match="needs 6 GPUs, 4 are there for m"):
        planned("tp2*3", FOUR, 4)
    with pytest.raises(ConfigInvalid, match="a tensor-parallel group needs one node"):
        planned("tp4*1", in_force(), 2, 2)


def test_the_model_is_the_only_one_or_named() -> None:
    """Another model's replicas would be replaced."""
    assert which_model("", TWO, offers(2)) == "m"
    several = offers(2, models=("m", "other"))
    assert which_model("other", TWO, several) == "other"
    with pytest.raises(ConfigInvalid, match=r"--model = '': name one .* m, other"):
        which_model("", TWO, several)
    with pytest.raises(ConfigInvalid, match="--model = 'x'"):
        which_model("x", TWO, several)


def test_workers_that_leave_are_no_offer() -> None:
    """A replica would be put where it must leave at once."""
    reports = [
        WorkerReport(
            worker_id=f"n0-g{i}",
            incarnation="i",
            node_id="n0",
            gpu=GpuSpec(gpu_id=f"n0-g{i}"),
            models=("m",),
            leaving=bool(i),
        )
        for i in range(2)
    ]
    assert [offer.gpu_id for offer in offers_of(reports)] == ["n0-g0"]
