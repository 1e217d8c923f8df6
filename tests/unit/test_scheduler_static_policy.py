"""Policy static: where the topology's replicas go when GPUs come and go."""

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import GpuOffer, Planned
from services.scheduler.static_policy import choose_gpus, plan_static
from shared.mesh import ReplicaWish
from shared.messages.plans import DeploymentPlan, ReplicaSpec

EMPTY = DeploymentPlan(plan_id="none")


def offers(*gpus: str, kind: str = "cpu") -> list[GpuOffer]:
    return [GpuOffer(gpu_id=gpu, node_id=gpu.split("-")[0], kind=kind) for gpu in gpus]


def plan(
    wishes: list[ReplicaWish],
    gpus: list[GpuOffer],
    in_force: DeploymentPlan = EMPTY,
    kinds: dict[str, str] | None = None,
) -> Planned:
    known = kinds or {offer.gpu_id: offer.kind for offer in gpus}
    return plan_static(wishes, "m", offers=gpus, kinds=known, in_force=in_force)


def placement(planned: Planned) -> dict[str, tuple[str, ...]]:
    assert planned.plan is not None
    return {spec.replica_id: spec.gpus for spec in planned.plan.replicas}


def wish(replica_id: str, *gpus: str, shape: str = "tp1pp1") -> ReplicaWish:
    return ReplicaWish(replica_id=replica_id, parallelism=shape, gpus=gpus)


def test_pinned_replicas_get_their_gpus_and_equal_shares() -> None:
    """Otherwise the operator's topology would not be what serves."""
    planned = plan([wish("b", "n0-g1"), wish("a", "n1-g0")], offers("n0-g0", "n0-g1", "n1-g0"))
    assert placement(planned) == {"a": ("n1-g0",), "b": ("n0-g1",)}
    assert planned.plan is not None
    assert planned.plan.weights == {"*": {"a": 0.5, "b": 0.5}}


def test_replicas_that_can_stay_do_stay() -> None:
    """Otherwise a GPU that comes back would move a healthy replica and cost its requests."""
    before = plan([wish("a", "n0-g0"), wish("b", "n0-g1")], offers("n0-g0", "n0-g1")).plan
    assert before is not None
    moved = plan([wish("a", "n0-g0"), wish("b", "n0-g1")], offers("n0-g0", "n1-g0"), before,
                 {"n0-g1": "cpu"})  # fmt: skip
    assert placement(moved) == {"a": ("n0-g0",), "b": ("n1-g0",)}
    assert "b moves from n0-g1 to n1-g0" in moved.reason
    assert moved.plan is not None
    back = plan(
        [wish("a", "n0-g0"), wish("b", "n0-g1")], offers("n0-g0", "n0-g1", "n1-g0"), moved.plan
    )
    assert back.plan is not None
    assert back.plan.plan_id == moved.plan.plan_id


def test_a_replica_moves_only_to_gpus_of_its_kind() -> None:
    """Otherwise a replica measured on one kind of GPU would run on another, at other rates."""
    before = plan([wish("a", "n0-g0")], offers("n0-g0", kind="h100")).plan
    assert before is not None
    planned = plan([wish("a", "n0-g0")], offers("n1-g0", kind="l4"), before, {"n0-g0": "h100"})
    assert planned.plan is None
    assert planned.dropped == ("a",)
    assert "needs 1 h100 GPU" in planned.reason


def test_what_does_not_fit_is_left_out_and_named() -> None:
    """Otherwise one big replica without room would keep the others from serving."""
    planned = plan([wish("a"), wish("big", shape="tp4")], offers("n0-g0", "n0-g1"))
    assert placement(planned) == {"a": ("n0-g0",)}
    assert planned.dropped == ("big",)
    assert "big left out: needs 4 like GPUs, 1 free" in planned.reason


def test_no_gpu_no_plan() -> None:
    """Otherwise an empty plan would stop what may come back by itself."""
    planned = plan([wish("a")], [])
    assert planned.plan is None
    assert planned.reason.startswith("static: 0 of 1")


def test_a_changed_shape_is_planned_anew() -> None:
    """Otherwise an edited topology would never take effect for a replica that runs."""
    before = plan([wish("a", shape="tp1")], offers("n0-g0", "n0-g1")).plan
    assert before is not None
    planned = plan([wish("a", shape="tp2")], offers("n0-g0", "n0-g1"), before)
    assert placement(planned) == {"a": ("n0-g0", "n0-g1")}


def test_ranks_of_a_replica_share_a_node_and_fill_it_best() -> None:
    """Otherwise tensor parallelism would cross hosts, or big nodes be nibbled away."""
    free = offers("n0-g0", "n0-g1", "n0-g2", "n1-g0", "n1-g1")
    assert choose_gpus(2, "", free) == ("n1-g0", "n1-g1")
    assert choose_gpus(4, "", free) == ("n0-g0", "n0-g1", "n0-g2", "n1-g0")
    assert choose_gpus(6, "", free) == ()


def test_a_plan_id_names_the_contents_and_nothing_else() -> None:
    """Otherwise equal plans would be switched between, or a new wording would drain replicas."""
    one = ReplicaSpec(replica_id="a", model_id="m", parallelism="tp1pp1", gpus=("n0-g0",))
    two = ReplicaSpec(replica_id="b", model_id="m", parallelism="tp1pp1", gpus=("n0-g1",))
    row = {"*": {"b": 0.5, "a": 0.5}}
    first = make_plan([one, two], row, reason="x")
    again = make_plan([two, one], {"*": {"a": 0.5, "b": 0.5}}, reason="y")
    other = make_plan([one, two], {"*": {"a": 0.4, "b": 0.6}}, reason="x")
    assert first.plan_id == again.plan_id != other.plan_id
    assert first.replicas == again.replicas


def test_a_wish_names_its_model_or_means_the_first() -> None:
    """Otherwise only one of the topology's models could ever serve."""
    second = ReplicaWish(replica_id="b", model_id="other")
    planned = plan([wish("a"), second], offers("n0-g0", "n0-g1", "n0-g2"))
    assert planned.plan is not None
    assert {s.replica_id: s.model_id for s in planned.plan.replicas} == {"a": "m", "b": "other"}
    only_m = [GpuOffer(gpu_id="n0-g0", node_id="n0", kind="cpu", models=("m",))]
    lone = plan([wish("a"), second], only_m, planned.plan)
    assert placement(lone) == {"a": ("n0-g0",)}
    assert "b left out: needs 1 like GPU, 0 free" in lone.reason
