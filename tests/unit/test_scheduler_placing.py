"""Where replicas go, what they weigh, and what no plan may do."""

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.placing import Placement, choose, place
from services.scheduler.policies.verify import verify
from services.scheduler.policies.weights import equal, joined
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

EMPTY = DeploymentPlan(plan_id="none")
TP1, TP2, TP4, TP8 = (Parallelism(tp=tp) for tp in (1, 2, 4, 8))


def nodes(*sizes: int, kind: str = "h100") -> list[GpuOffer]:
    return [
        GpuOffer(gpu_id=f"n{n}-g{g}", node_id=f"n{n}", kind=kind)
        for n, size in enumerate(sizes)
        for g in range(size)
    ]


def in_force(*replicas: tuple[str, Parallelism, str]) -> DeploymentPlan:
    """Replicas of model m: id, shape and GPUs, such as ``n0-g0 n0-g1``."""
    specs = tuple(
        ReplicaSpec(replica_id=id_, model_id="m", parallelism=str(shape), gpus=tuple(gpus.split()))
        for id_, shape, gpus in replicas
    )
    return make_plan(specs, equal(specs), reason="test")


def gpus(placement: Placement) -> dict[str, tuple[str, ...]]:
    return {spec.replica_id: spec.gpus for spec in placement.replicas}


def test_new_replicas_are_named_by_model_and_shape_and_fill_nodes_largest_first() -> None:
    """Otherwise a plan would not say what it runs, or small replicas nibble nodes away."""
    placed = place({("llama/2.70b", TP2): 2, ("llama/2.70b", TP4): 1}, nodes(4, 4), EMPTY)
    assert gpus(placed) == {
        "llama-2-70b-tp4-0": ("n0-g0", "n0-g1", "n0-g2", "n0-g3"),
        "llama-2-70b-tp2-0": ("n1-g0", "n1-g1"),
        "llama-2-70b-tp2-1": ("n1-g2", "n1-g3"),
    }
    assert (placed.dropped, placed.reason) == ((), "")


def test_standing_replicas_stay_and_keep_their_ids() -> None:
    """Otherwise each decision would restart what already serves."""
    before = in_force(("old", TP2, "n1-g0 n1-g1"), ("gone", TP1, "n0-g0"))
    placed = place({("m", TP2): 2}, nodes(2, 2), before)
    assert gpus(placed) == {"old": ("n1-g0", "n1-g1"), "m-tp2-0": ("n0-g0", "n0-g1")}


def test_surplus_replicas_leave_whole_nodes_free() -> None:
    """Otherwise shrinking would leave crumbs on every node, and no room for a big replica."""
    before = in_force(
        ("a", TP2, "n0-g0 n0-g1"),
        ("b", TP2, "n1-g0 n1-g1"),
        ("c", TP2, "n1-g2 n1-g3"),
    )
    placed = place({("m", TP2): 2, ("m", TP4): 1}, nodes(4, 4), before)
    assert set(gpus(placed)) == {"b", "c", "m-tp4-0"}


def test_a_standing_replica_moves_when_a_larger_one_needs_its_node() -> None:
    """Otherwise a plan that fits would be refused for the sake of where things happen to be."""
    before = in_force(("a", TP1, "n0-g0"), ("b", TP1, "n1-g0"))
    placed = place({("m", TP1): 2, ("m", TP4): 1}, nodes(4, 4), before)
    assert placed.dropped == ()
    assert len({"a", "b"} & gpus(placed).keys()) == 1
    assert "1 standing replicas moved" in placed.reason


def test_what_finds_no_room_is_named() -> None:
    """Otherwise a plan would silently serve less than was decided."""
    placed = place({("m", TP4): 2}, nodes(4, 3), EMPTY)
    assert placed.dropped == (("m", TP4),)
    assert placed.reason == "1 x m tp4 left out: no room"


def test_tensor_parallel_groups_stay_inside_a_node_and_pipelines_may_not() -> None:
    """Otherwise all-reduces would cross the network, or a pipeline find no room that there is."""
    assert choose(TP4, nodes(2, 2)) == ()
    assert choose(Parallelism(tp=2, pp=2), nodes(3, 3)) == ("n0-g0", "n0-g1", "n1-g0", "n1-g1")
    assert choose(Parallelism(tp=2, pp=2), nodes(3, 4)) == tuple(f"n1-g{g}" for g in range(4))
    mixed = [*nodes(1, kind="h100"), GpuOffer(gpu_id="x", node_id="n0", kind="l4")]
    assert choose(TP2, mixed) == ()


def test_a_replica_goes_where_its_model_can_be_served() -> None:
    """Otherwise it would be started on a worker that does not have its checkpoint."""
    other = [GpuOffer(gpu_id="n0-g0", node_id="n0", kind="h100", models=("other",))]
    assert place({("m", TP1): 1}, other, EMPTY).dropped == (("m", TP1),)
    assert place({("other", TP1): 1}, other, EMPTY).dropped == ()


def test_rows_of_several_models_share_a_type_without_mixing() -> None:
    """Otherwise type 0 of one model would be routed by the weights of another's."""
    rows = {
        "a": {"0": {"a0": 3.0, "a1": 1.0}, "1": {"a1": 2.0}},
        "b": {"*": {"b0": 1.0}},
    }
    weights = joined(rows)
    assert weights["0"] == {"a0": 0.375, "a1": 0.125, "b0": 0.5}
    assert weights["1"] == {"a1": 0.5, "b0": 0.5}
    assert weights["*"] == {"a0": 0.1875, "a1": 0.3125, "b0": 0.5}
    assert joined({"a": {"0": {"a0": 0.0}}}) == {}


def test_a_plan_is_checked_against_all_that_must_hold() -> None:
    """Otherwise a policy's mistake would reach the workers."""
    good = in_force(("a", TP2, "n0-g0 n0-g1"))
    assert verify(good, nodes(2), ["m"]) == []

    def wrong(plan: DeploymentPlan, *sizes: int) -> str:
        return "; ".join(verify(plan, nodes(*sizes), ["m"]))

    assert "no replica" in wrong(EMPTY, 2)
    assert "not on offer" in wrong(good, 1)
    assert "spans n0, n1" in wrong(in_force(("a", TP2, "n0-g0 n1-g0")), 1, 1)
    across = in_force(("a", TP2, "n0-g0 n1-g0"))
    assert verify(across, nodes(1, 1), ["m"], across_nodes=["a"]) == []
    assert "has 2 owners" in wrong(in_force(("a", TP1, "n0-g0"), ("b", TP1, "n0-g0")), 1)
    assert "named 2 times" in wrong(in_force(("a", TP1, "n0-g0"), ("a", TP1, "n0-g1")), 2)
    assert "needs 2" in wrong(in_force(("a", TP2, "n0-g0")), 1)
    assert "unknown model" in "; ".join(verify(good, nodes(2), ["x"]))

    def row(**shares: float) -> str:
        plan = DeploymentPlan(plan_id="p", replicas=good.replicas, weights={"*": shares})
        return wrong(plan, 2)

    assert "sum to 0.5" in row(a=0.5)
    assert "unknown replicas b" in row(a=0.5, b=0.5)
    assert "finite" in row(a=float("nan"))
    assert "serve" in "; ".join(
        verify(good, [GpuOffer(gpu_id=f"n0-g{g}", node_id="n0", kind="h100", models=("x",))
                      for g in range(2)], ["m"])
    )  # fmt: skip
