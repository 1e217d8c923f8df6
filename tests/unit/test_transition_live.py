"""What a live switch costs, and when the scheduler counts on one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import Fleet
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.transition import Change, change
from services.scheduler.policies.transition_live import PAUSE_S, is_live, live_toll
from services.scheduler.policies.transition_rules import ruled
from services.scheduler.policies.transition_verdict import affordable_way
from shared.cost.memory import weight_bytes
from shared.cost.model import CostModel, replica_model
from shared.hardware import GpuSpec, Parallelism
from shared.mesh import MeshConfig
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import HostedReplica, WorkerReport
from shared.models import ModelSpec
from shared.placement.sheets import ModelShape
from tests.unit.joint_cases import FACTS, GPU, offers, problem, profile
from tests.unit.test_transition import (
    AFTER,
    BEFORE,
    FOUR,
    SMALL,
    M,
    in_force,
    judge_of,
    move_of,
    replicas,
    scaled,
)

CACHE = 20 * 10**9


def movable(count: int, *models: str, cache_bytes: int = CACHE) -> tuple[GpuOffer, ...]:
    return tuple(
        replace(offer, movable=models or (M, SMALL), cache_bytes=cache_bytes)
        for offer in offers(count)
    )


def models_of(*specs: ReplicaSpec) -> dict[str, CostModel]:
    return {
        spec.replica_id: replica_model(
            profile(spec.model_id), GPU, Parallelism.parse(spec.parallelism)
        )
        for spec in specs
    }


def live(made: Change, gpus: Sequence[GpuOffer]) -> bool:
    return is_live(made, gpus, models_of(*made.going, *made.coming))


WIDER = change(replicas("tp4", [0, 4]), replicas("tp8", [0]))


def test_a_change_among_workers_that_can_move_weights_is_live() -> None:
    """The scheduler would count the losses of a reload that does not take place."""
    assert live(WIDER, movable(8))


@pytest.mark.parametrize(
    ("made", "gpus"),
    [
        (change((), replicas("tp8", [0])), movable(8)),
        (change(replicas("tp4", [0]), replicas("tp1", [0], model_id=SMALL)), movable(8)),
        (WIDER, movable(8, SMALL)),
        (WIDER, movable(7)),
        (WIDER, offers(8)),
        (WIDER, movable(8, cache_bytes=35 * 10**9)),
    ],
    ids=["first", "orphans", "immovable", "not-on-offer", "no-shapes", "no-room"],
)
def test_what_the_switcher_would_reload_is_not_live(
    made: Change, gpus: tuple[GpuOffer, ...]
) -> None:
    """The scheduler would believe in a switch that costs nothing, and get one that stops replicas
    for a minute."""
    assert not live(made, gpus)


def test_a_replica_that_changes_under_its_name_is_reloaded() -> None:
    """The switcher would do so."""
    [one] = replicas("tp4", [0])
    other = ReplicaSpec(
        replica_id=one.replica_id,
        model_id=M,
        parallelism="tp4pp1",
        gpus=replicas("tp4", [4])[0].gpus,
    )
    assert not live(change((one,), (other,)), movable(8))


def test_it_takes_an_engines_start_and_the_copies_and_costs_a_pause() -> None:
    """From GPUs of the same node over its links; where old and new share GPUs they may take turns
    in the pause."""
    paid = live_toll(
        WIDER, movable(8), models_of(*WIDER.coming), running={"llama-2-70b-tp4-0": 7.0}
    )
    shard = weight_bytes(FACTS[M], Parallelism(8, 1))[0]
    fetch_s = shard / GPU.peer.bytes_per_s + GPU.peer.latency_s
    assert paid.pause_s == pytest.approx(PAUSE_S + fetch_s)
    assert paid.seconds == pytest.approx(GPU.engine_start_s + fetch_s + PAUSE_S + fetch_s)
    assert (paid.bytes_moved, paid.requests_paused) == (8 * shard, 7.0)
    assert paid.busiest_link_s == pytest.approx(fetch_s)


def test_what_comes_without_anything_going_pauses_nobody() -> None:
    """From another node the network is the way; of a model that nothing serves, the disk."""
    [one] = replicas("tp4", [0])
    [far] = replicas("tp4", [8])
    [new] = replicas("tp1", [12], model_id=SMALL)
    paid = live_toll(change((one,), (one, far)), movable(16), models_of(far), running={})
    shard = weight_bytes(FACTS[M], Parallelism(4, 1))[0]
    assert paid.busiest_link_s == pytest.approx(shard / GPU.network.bytes_per_s, rel=1e-3)
    assert paid.pause_s == 0.0
    paid = live_toll(change((one,), (one, new)), movable(16), models_of(new), running={})
    whole = weight_bytes(FACTS[SMALL], Parallelism(1, 1))[0]
    assert paid.busiest_link_s == pytest.approx(whole / GPU.disk.bytes_per_s, rel=1e-2)


@pytest.mark.parametrize("headroom", [4.0, 1.15])
def test_a_live_change_is_made_at_once_however_heavy_the_load(headroom: float) -> None:
    """What would have to be walked in steps, or not at all, while replicas start."""
    case = problem({M: FOUR}, movable(32), in_force=in_force(*BEFORE))
    judge = judge_of(scaled(case, counts={"tp8": 4}, headroom=headroom))
    move = replace(move_of(judge, BEFORE, AFTER, lasts_s=3600.0), must_pay=False)
    way = affordable_way(move)
    assert (len(way.steps), way.refused) == (1, "")
    outlook = way.outlook(move, "", moves=True)
    assert outlook.pause_s is not None
    assert outlook.pause_s < 1.0 < outlook.seconds
    assert outlook.served_share == 1.0
    lost = (move.judge.dispatched(Counter()).lateness, outlook.cost)
    assert outlook.cost <= lost[0] * 1.0
    assert "of it in a pause" in ruled(replace(move, must_pay=True)).why


def test_an_operators_word_on_how_long_a_switch_takes_counts() -> None:
    """`scheduler.switch_s` would say nothing where workers can move weights."""
    case = problem({M: FOUR}, movable(32), in_force=in_force(*BEFORE))
    judge = judge_of(scaled(case, counts={"tp8": 4}, headroom=4.0))
    move = replace(move_of(judge, BEFORE, AFTER, lasts_s=3600.0), switch_s=12.0)
    assert {(each.seconds, each.pause_s) for each in affordable_way(move).tolls} == {(12.0, None)}


def test_workers_say_what_they_can_move() -> None:
    """Only who reports shapes, and where it is reached, can give or take weights."""
    shape = ModelShape(
        model_id="m", layers=1, hidden=8, intermediate=8, heads=2, kv_heads=2, head_dim=4,
        vocabulary=8, item_bytes=2,
    )  # fmt: skip
    fleet = Fleet(SchedulerConfig(), MeshConfig(model=ModelSpec(model_id="m")))
    for worker_id, peer in (("g0", "tcp://g0"), ("g1", "")):
        held = HostedReplica(
            replica_id="r", epoch=1, phase="serving", parallelism="tp1pp1", cache_bytes=5
        )
        report = WorkerReport(
            worker_id=worker_id, incarnation="i", node_id="n", gpu=GpuSpec(gpu_id=worker_id),
            models=("m",), replicas=(held,), peer=peer, shapes=(shape,),
        )  # fmt: skip
        fleet.hear(report, 0.0)
    fleet.settle()
    first, second = fleet.offers(0.0, in_use=())
    assert (first.movable, first.cache_bytes) == (("m",), 5)
    assert second.movable == ()
