"""Plans of copies for switches that can be worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest

from services.switcher.transfer import (
    Held,
    Links,
    Move,
    TransferPlan,
    TransferProblem,
    plan_transfer,
    verify_transfer,
)
from services.switcher.transfer.greedy import greedy_transfer
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import Area, Rank, cache_token_bytes, weight_bytes
from tests.support.transfers import LLAMA_70B, SMALL, every_move, replicas

NODES = {gpu: gpu[:1] for gpu in ("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3")}
WHOLE = weight_bytes(SMALL, Rank())
HALF = weight_bytes(SMALL, Rank(tp=2))
TOKEN = cache_token_bytes(SMALL, Rank())


def planned(problem: TransferProblem) -> TransferPlan:
    plan = plan_transfer(problem)
    assert verify_transfer(problem, plan) == []
    return plan


def test_a_replica_that_becomes_two_ranks_keeps_its_half() -> None:
    """Bytes that are in place already would be moved."""
    old, new = replicas("old", ["tp1"], ["a0"]), replicas("new", ["tp2"], ["a0", "a1"])
    plan = planned(
        TransferProblem(
            models={"m": SMALL}, nodes=NODES, leaving=old, arriving=new,
            moves=every_move(old, new, 10),
        )
    )  # fmt: skip
    half_cache = 10 * TOKEN // 2
    assert plan.bytes_by_link == {"a0>a1": HALF + half_cache}
    assert plan.bytes_bound == HALF + half_cache
    assert plan.bytes_in_place == HALF + half_cache
    assert plan.cache_bytes == half_cache
    assert plan.stages == ((0, 0),)
    assert plan.cache_bytes_max == {"a0": 0, "a1": 0}
    assert Copy("cache", Area((0, 6), (2, 4)), "a0", "old0") in plan.copies["a1"]["new0"]
    assert {copy.source for copy in plan.copies["a0"]["new0"]} == {"a0"}
    assert len(plan.copies["a0"]["new0"]) == 8  # each sheet once


def test_sources_of_the_own_node_come_first() -> None:
    """Otherwise the network would carry what NVLink could."""
    old = replicas("old", ["tp1", "tp1"], ["a0", "b0"])
    new = replicas("new", ["tp1", "tp1"], ["a1", "b1"])
    plan = planned(TransferProblem(models={"m": SMALL}, nodes=NODES, staying=old, arriving=new))
    assert plan.bytes_by_link == {"a0>a1": WHOLE, "b0>b1": WHOLE}


def test_many_sources_share_the_work() -> None:
    """Otherwise one GPU would send all while its like are idle."""
    model = LLAMA_70B
    old = replicas("old", ["tp1"] * 3, ["a0", "a1", "a2"], model.model_id)
    new = replicas("new", ["tp1"] * 2, ["b0", "b1"], model.model_id)
    fast = Links(network=1e13)
    problem = TransferProblem(
        models={model.model_id: model}, nodes=NODES, staying=old, arriving=new, links=fast
    )
    plan = planned(problem)
    sent = {
        source: sum(size for link, size in plan.bytes_by_link.items() if link.startswith(source))
        for source in ("a0", "a1", "a2")
    }
    whole = weight_bytes(model, Rank())
    assert plan.seconds == pytest.approx(whole / fast.peer, rel=0.01)
    assert max(sent.values()) <= whole * 1.01


def test_one_memory_is_one_link() -> None:
    """On CPU it does not matter who sends; the solver is not asked."""
    old = replicas("old", ["tp1", "tp1"], ["a0", "a1"])
    new = replicas("new", ["tp2"], ["a2", "a3"])
    links = Links.cpu()
    plan = planned(
        TransferProblem(models={"m": SMALL}, nodes=NODES, staying=old, arriving=new, links=links)
    )
    moved = weight_bytes(SMALL, Rank(tp=2)) + weight_bytes(SMALL, Rank(tp_rank=1, tp=2))
    assert plan.seconds == pytest.approx(moved / links.local)
    assert plan.seconds == plan.seconds_bound


def test_what_is_taken_over_as_it_lies_keeps_no_link_busy() -> None:
    """Otherwise a switch in place would seem to take as long as one that moves everything."""
    old, new = replicas("old", ["tp1"], ["a0"]), replicas("new", ["tp1pp2"], ["a0", "a1"])
    links = Links.cpu()
    plan = planned(
        TransferProblem(models={"m": SMALL}, nodes=NODES, leaving=old, arriving=new, links=links)
    )
    second = weight_bytes(SMALL, Rank(pp_rank=1, pp=2))
    assert plan.bytes_in_place == weight_bytes(SMALL, Rank(pp=2))
    assert plan.seconds == pytest.approx(second / links.local)


def test_only_what_no_gpu_holds_comes_from_the_disk() -> None:
    """A switch would wait for the disk although a GPU has the bytes."""
    old, new = replicas("old", ["tp2"], ["a0", "a1"]), replicas("new", ["tp1"], ["a2"])
    plan = planned(
        TransferProblem(
            models={"m": SMALL}, nodes=NODES, leaving=old, arriving=new, dead=frozenset({"a1"}),
            moves=every_move(old, new, 10),
        )
    )  # fmt: skip
    assert plan.bytes_by_link == {"a0>a2": HALF, "disk>a2": WHOLE - HALF}
    assert {copy.replica_id for copy in plan.copies["a2"]["new0"] if copy.source == DISK} == {""}
    assert plan.replayed == (("old0", "new0"),)
    assert "lost GPUs" in plan.notes[0]
    assert not any(copy.sheet == "cache" for copy in plan.copies["a2"]["new0"])


def test_a_way_is_planned_for_requests_that_are_yet_to_come() -> None:
    """Requests that arrive during the switch could not be taken over."""
    old, new = replicas("old", ["tp1"], ["a0"]), replicas("new", ["tp1"], ["a1"])
    plan = planned(
        TransferProblem(
            models={"m": SMALL}, nodes=NODES, leaving=old, arriving=new,
            moves=every_move(old, new, 0),
        )
    )  # fmt: skip
    assert plan.cache_bytes == 0
    assert plan.bytes_by_link == {"a0>a1": WHOLE}
    assert any(copy.sheet == "cache" for copy in plan.copies["a1"]["new0"])


def test_one_that_stays_takes_requests_and_no_weights() -> None:
    """A replica that serves would be sent weights that it has."""
    old, stays = replicas("old", ["tp1"], ["a0"]), replicas("stays", ["tp2"], ["a1", "a2"])
    problem = TransferProblem(
        models={"m": SMALL}, nodes=NODES, leaving=old, staying=stays,
        moves=every_move(old, stays, 10),
        held={gpu: Held(cache_bytes=6 * TOKEN, cache_used_bytes=3 * TOKEN) for gpu in NODES},
    )  # fmt: skip
    plan = planned(problem)
    assert plan.copies.keys() == {"a1", "a2"}
    assert {c.sheet for copies in plan.copies.values() for c in copies["stays0"]} == {"cache"}
    assert plan.bytes_by_link == {"a0>a1": 5 * TOKEN, "a0>a2": 5 * TOKEN}
    assert plan.notes == ("4 of 10 tokens for stays0 do not fit: replayed",)


def tight(room: int, tokens: int = 0) -> TransferProblem:
    """tp2 to two pipeline stages on the same GPUs, with ``room`` bytes beside the larger."""
    old, new = replicas("old", ["tp2"], ["a0", "a1"]), replicas("new", ["tp1pp2"], ["a0", "a1"])
    largest = max(
        *(weight_bytes(SMALL, Rank(tp_rank=rank, tp=2)) for rank in range(2)),
        *(weight_bytes(SMALL, Rank(pp_rank=rank, pp=2)) for rank in range(2)),
    )
    return TransferProblem(
        models={"m": SMALL}, nodes=NODES, leaving=old, arriving=new,
        moves=every_move(old, new, tokens),
        budget_bytes={"a0": largest + room, "a1": largest + room},
    )  # fmt: skip


def test_what_fits_side_by_side_needs_one_stage_and_leaves_the_rest_to_the_cache() -> None:
    """Requests would wait for weights that could have come before the pause."""
    plan = planned(tight(WHOLE))
    assert plan.stages == ((0, 0),)
    largest = plan_room(WHOLE)
    assert plan.cache_bytes_max == largest


def plan_room(room: int) -> dict[str, int]:
    """What is left beside old and new of ``tight``."""
    problem = tight(room)
    return {
        gpu: problem.budget_bytes[gpu]
        - weight_bytes(SMALL, Rank(tp_rank=rank, tp=2))
        - weight_bytes(SMALL, Rank(pp_rank=rank, pp=2))
        for rank, gpu in enumerate(("a0", "a1"))
    }


def test_what_does_not_fit_goes_by_turns_through_both_stages() -> None:
    """Layers in order would need half the model more on the first GPU."""
    plan = planned(tight(WHOLE // 4))
    assert len(plan.stages) > 2
    assert sorted(layer for span in plan.stages for layer in range(*span)) == list(range(6))
    starts = [span[0] for span in plan.stages if span != (0, 0)]
    assert starts != sorted(starts)
    assert "side by side" in plan.notes[0]
    stages = {copy.stage for copy in plan.copies["a0"]["new0"] if copy.sheet == "mlp"}
    assert len(stages) > 1


def test_a_replica_that_lost_a_rank_frees_nothing() -> None:
    """It hears no commands any more: what it holds would be counted on, and be there still."""
    problem = tight(WHOLE // 4)
    third = replicas("old", ["tp1pp3"], ["a0", "a1", "a2"])
    whole = planned(replace(problem, leaving=third))
    assert len(whole.stages) > 1
    assert plan_transfer(replace(problem, leaving=third, dead=frozenset({"a2"}))).infeasible


def test_cache_that_does_not_fit_is_given_up_before_the_switch_is() -> None:
    """A switch would fail for want of memory that replayed requests do not need."""
    assert planned(tight(WHOLE // 4, tokens=4)).replayed == ()
    plan = planned(tight(WHOLE // 4, tokens=WHOLE // TOKEN))
    assert plan.replayed == (("old0", "new0"),)
    assert any("do not fit: replayed" in note for note in plan.notes)
    assert not any(copy.sheet == "cache" for copy in plan.copies["a0"]["new0"])


def test_a_switch_that_cannot_be_says_why() -> None:
    """An operator would see a reload and no reason for it."""
    plan = plan_transfer(tight(-1))
    assert "a0" in plan.infeasible or "a1" in plan.infeasible
    assert plan.copies == {}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"models": {}}, "model"),
        ({"nodes": {}}, "gpus"),
        ({"dead": frozenset({"a1"})}, "gpus"),
        ({"staying": replicas("new", ["tp1"], ["a2"])}, "replica_id"),
        ({"moves": (Move(source="old0", target="old0"),)}, "moves"),
        ({"moves": (Move(source="old0", target="new0"),) * 2}, "moves"),
        ({"arriving": replicas("new", ["tp9"], [f"a{i}" for i in range(9)])}, "tp"),
    ],
)
def test_what_is_no_switch_is_refused(change: dict[str, object], word: str) -> None:
    """A wrong question would get an answer that nobody can perform."""
    arguments: dict[str, object] = {
        "models": {"m": SMALL},
        "nodes": NODES,
        "leaving": replicas("old", ["tp1"], ["a0"]),
        "arriving": replicas("new", ["tp1"], ["a1"]),
    }
    problem = TransferProblem(**(arguments | change))  # pyright: ignore[reportArgumentType]
    assert word in plan_transfer(problem).infeasible


def test_nothing_to_do_is_a_plan() -> None:
    """A change of weights alone would be taken for one that cannot be."""
    assert plan_transfer(TransferProblem(models={}, nodes={})) == TransferPlan()


def test_the_greedy_comparator_overloads_a_network_that_the_planner_spares() -> None:
    """It looks at senders alone: the planner must be able to show the difference."""
    model = LLAMA_70B
    old = replicas("old", ["tp2", "tp2"], ["a0", "a1", "b0", "b1"], model.model_id)
    new = replicas("new", ["tp4"], ["b0", "b2", "b3", "a3"], model.model_id)
    problem = TransferProblem(
        models={model.model_id: model}, nodes=NODES, leaving=old, arriving=new,
        moves=(Move(source="old0", target="new0", tokens=1000),),
    )  # fmt: skip
    greedy = greedy_transfer(problem)
    assert verify_transfer(problem, greedy) == []
    assert planned(problem).seconds <= greedy.seconds


def test_scipy_is_loaded_only_when_it_is_needed() -> None:
    """Otherwise every switcher would start a second later and take 60 MB more."""
    code = (
        "import sys; from services.switcher.transfer import plan_transfer, TransferProblem; "
        "plan_transfer(TransferProblem(models={}, nodes={})); assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
