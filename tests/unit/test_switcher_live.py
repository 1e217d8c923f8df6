"""A live switch, phase by phase: what each tells whom, what ends it, and what goes wrong in it."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from services.switcher.events import TransferPlanned
from shared.core import Log, Publish, Store
from shared.messages.plans import (
    DeploymentPlan,
    PlanInForce,
    StoredPlan,
    SwitchEnded,
    SwitchProgress,
    SwitchStarted,
)
from shared.messages.replicas import (
    AdvanceStage,
    HostedReplica,
    PrepareReplica,
    StartReplica,
    TakeRequests,
)
from shared.placement.copies import Copy
from shared.placement.sheets import Area
from tests.unit.switcher_runs import CONFIG, SHAPE, Run, hosted, plan, replica

TWO = plan("TWO", replica("r0", "g0"), replica("r1", "g1"))
WIDE = plan("WIDE", replica("r2", "g0", "g1"))
COPY = Copy("query", Area((0, 4), (2, 4)), "g0", "r0")
PLANNED = TransferPlanned(epoch=2, copies={"g1": {"r2": (COPY,)}}, bytes_total=100, bytes_bound=90)


def preparing() -> Run:
    """TWO is in force and served; the switch to WIDE is stored, its copies are being planned."""
    run = Run(live=True).in_force(TWO, 1)
    run.adopt(WIDE, 1)
    run.write()
    return run


def hold(run: Run, phase: Any, old: Any = "serving", *, epoch: int = 2, **more: Any) -> None:
    """Both workers report the old replica, and r2 in ``phase``, prepared unless it says not."""
    done = {} if phase == "preparing" else {"prepared": epoch}
    for rank in (0, 1):
        r2 = hosted("r2", epoch, phase, rank=rank, tp=2)
        r2 = msgspec.structs.replace(r2, **done, **(more if rank == 0 else {}))
        old_epoch = epoch if old == "paused" else 1
        run.report(f"g{rank}", hosted(f"r{rank}", old_epoch, old), r2)


def pausing() -> Run:
    run = preparing()
    run.planned(PLANNED)
    hold(run, "preparing")
    run.prepared("r2@g0", 2, g0=50)
    run.prepared("r2@g1", 2, g0=40, g1=10)
    return run


def taking() -> Run:
    run = pausing()
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    return run


def activating() -> Run:
    run = taking()
    run.taken("r2@g0", 2)
    run.write()
    return run


def retiring() -> Run:
    run = activating()
    run.started("r2@g0", 2)
    run.started("r2@g1", 2)
    return run


BEFORE_COMMIT = {"preparing": preparing, "pausing": pausing, "taking": taking}
AFTER_COMMIT = {"activating": activating, "retiring": retiring}


def test_two_replicas_become_one_without_a_gap() -> None:
    """Otherwise the new replica would not be ready, or not have the requests, when the old go."""
    run = preparing()
    (started,) = run.said(SwitchStarted)
    assert (started.way, started.why) == ("live", "")
    assert run.bucket == StoredPlan(epoch=1, in_force=TWO, target=WIDE, target_epoch=2, way="live")
    assert run.deadlines == [("preparing", CONFIG.prepare_timeout_s)]
    assert run.commands == [], "nobody hears of it before the copies are planned"
    run.planned(PLANNED)
    assert run.commands == ["prepare r2@g0 e2", "prepare r2@g1 e2"]
    hold(run, "preparing")
    run.prepared("r2@g0", 2)
    assert run.core.state == "preparing", "every rank has to be ready"
    run.prepared("r2@g1", 2)
    assert run.commands == ["pause r0@g0 e2", "pause r1@g1 e2"]
    assert run.deadlines == [("pausing", CONFIG.pause_timeout_s)]
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    assert run.commands == ["take r2@g0 e2 of r0,r1"]
    assert run.deadlines == [("taking", CONFIG.take_timeout_s)]
    run.taken("r2@g0", 2)
    assert run.effects == [
        Store("plan", StoredPlan(epoch=2, in_force=WIDE, target_epoch=2), run.revision)
    ]
    run.write()
    assert run.commands == ["start r2@g0 e2", "start r2@g1 e2"]
    kinds = [type(e.message) for e in run.effects if isinstance(e, Publish)]
    assert kinds.index(StartReplica) < kinds.index(PlanInForce), "it must serve when routers flip"
    run.started("r2@g0", 2)
    run.started("r2@g1", 2)
    assert run.commands == ["stop r0@g0 e2", "stop r1@g1 e2"]
    run.stopped("r0@g0", 2)
    run.stopped("r1@g1", 2)
    assert run.core.state == "settled"
    (ended,) = run.said(SwitchEnded)
    assert (ended.epoch, ended.plan_id, ended.succeeded) == (2, "WIDE", True)
    run.report("g0", hosted("r2", 2, rank=0, tp=2))
    run.report("g1", hosted("r2", 2, rank=1, tp=2))
    run.later()
    assert run.commands == []


def test_one_replica_becomes_two() -> None:
    """Otherwise the way back would not be one: all takers need requests of the one that goes."""
    run = Run(live=True).in_force(WIDE, 1)
    run.adopt(TWO, 1)
    run.write()
    run.planned()
    assert run.commands == ["prepare r0@g0 e2", "prepare r1@g1 e2"]
    for rank in (0, 1):
        ready = msgspec.structs.replace(hosted(f"r{rank}", 2, "prepared"), prepared=2)
        run.report(f"g{rank}", hosted("r2", 1, rank=rank, tp=2), ready)
    assert run.commands == ["pause r2@g0 e2"], "the leader stands for all of its ranks"
    run.paused("r2@g0", 2)
    assert run.commands == ["take r0@g0 e2 of r2", "take r1@g1 e2 of r2"]
    run.taken("r0@g0", 2)
    assert run.core.state == "taking"
    run.taken("r1@g1", 2)
    assert run.core.state == "committing"


def test_a_rank_is_told_all_that_it_needs() -> None:
    """Otherwise it could not find its copies, its fellow ranks, or whose requests it takes."""
    run = preparing()
    run.planned(PLANNED)
    first, second = run.said(PrepareReplica)
    assert (first.copies, second.copies) == ((), (COPY,))
    assert second.peers == {"g0": "tcp://g0", "g1": "tcp://g1"}
    assert second.sources == {"r0": "g0", "r1": "g1"}
    assert (second.shares.rows, second.shares.leaders) == ({"*": {"r2": 1.0}}, {"r2": "g0"})
    assert (second.stages, second.verify) == (1, False)
    (take,) = [m for m in _sent(taking()) if isinstance(m, TakeRequests)]
    assert (take.sources, take.peers) == (second.sources, second.peers)
    assert take.shares == second.shares
    (start, _) = [m for m in _sent(activating()) if isinstance(m, StartReplica)]
    assert start.peers == second.peers


def _sent(run: Run) -> list[Any]:
    return [e.message for e in run.effects if isinstance(e, Publish)]


def test_what_the_planner_is_asked() -> None:
    """Otherwise copies would be planned for another mesh than this one."""
    run = Run(live=True).in_force(TWO, 1, "g2")
    busy = msgspec.structs.replace(hosted("r0", 1), cache_bytes=1 << 20, cache_tokens=10)
    run.report("g0", busy)
    run.adopt(WIDE, 1)
    run.write()
    (asked,) = run.questions
    assert asked.shapes == {"m": SHAPE}
    assert (asked.leaving, asked.staying, asked.arriving) == (TWO.replicas, (), WIDE.replicas)
    assert asked.nodes == {"g0": "n0", "g1": "n0"}
    assert [(m.source, m.target, m.tokens) for m in asked.moves] == [
        ("r0", "r2", 10),
        ("r1", "r2", 0),
    ]
    assert (asked.held["g0"].cache_bytes, asked.dead) == (1 << 20, ())
    assert asked.held["g0"].used_bytes == 10 * SHAPE.layers * SHAPE.kv_heads * 2 * 16 * 2


@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_a_phase_before_the_commit_that_is_late_rolls_back(state: str) -> None:
    """Otherwise requests would wait for ever for a worker that hangs."""
    run = BEFORE_COMMIT[state]()
    assert run.core.state == state
    run.deadline(state, 2)
    back = StoredPlan(epoch=1, in_force=TWO, target=TWO, target_epoch=3, way="live")
    assert run.effects[-1] == Store("plan", back, run.revision)
    run.write()
    assert run.core.state == "rolling_back"


@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_a_new_rank_that_fails_before_the_commit_rolls_back(state: str) -> None:
    """Otherwise a replica that cannot serve would be put in force."""
    run = BEFORE_COMMIT[state]()
    if state == "preparing":
        run.planned(PLANNED)
        hold(run, "preparing")
    run.failed("r2@g1", 2)
    run.write()
    assert run.core.state == "rolling_back"
    assert {c for c in run.commands if c.startswith("stop")} == {"stop r2@g0 e3", "stop r2@g1 e3"}


@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_a_new_rank_whose_worker_restarts_before_the_commit_rolls_back(state: str) -> None:
    """Otherwise a group of ranks that cannot find together again would be waited for."""
    run = BEFORE_COMMIT[state]()
    if state == "preparing":
        run.planned(PLANNED)
        hold(run, "preparing")
    run.report("g1", incarnation="i2")
    assert run.core.state == "storing_target"
    reasons = [effect.fields["reason"] for effect in run.effects if isinstance(effect, Log)]
    assert reasons == ["r2 was lost on g1"]


@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_a_new_rank_whose_worker_vanishes_before_the_commit_rolls_back(state: str) -> None:
    """Otherwise the switch would wait for the dead until its deadline."""
    run = BEFORE_COMMIT[state]()
    for _ in range(5):
        if run.core.state == state:
            run.later()
            run.report("g0", hosted("r0", 1))
    assert run.core.state == "storing_target"


def test_a_rollback_resumes_what_stands_still() -> None:
    """Otherwise requests would be lost though nobody had to lose any."""
    run = taking()
    run.deadline("taking", 2)
    run.write()
    assert sorted(run.commands) == [
        "resume r0@g0 e3",
        "resume r1@g1 e3",
        "stop r2@g0 e3",
        "stop r2@g1 e3",
    ]
    for rank in (0, 1):
        run.started(f"r{rank}@g{rank}", 3)
        run.stopped(f"r2@g{rank}", 3)
    assert run.core.state == "committing"
    run.write()
    (ended,) = run.said(SwitchEnded)
    assert (ended.epoch, ended.succeeded) == (2, False)
    assert ended.report is not None
    assert {"preparing", "pausing", "taking", "rolling_back"} <= set(ended.report.phase_s)


def test_a_rollback_reloads_what_has_given_up_weights() -> None:
    """Otherwise a replica that lacks layers would be resumed."""
    run = taking()
    hold(run, "prepared", "paused")
    half = msgspec.structs.replace(hosted("r0", 2, "paused"), stage=1)
    run.report("g0", half)
    run.deadline("taking", 2)
    run.write()
    assert "stop r0@g0 e3" in run.commands
    assert "resume r1@g1 e3" in run.commands
    run.stopped("r0@g0", 3)
    run.later()
    assert "start r0@g0 e3" in run.commands


@pytest.mark.parametrize("state", AFTER_COMMIT)
def test_after_the_commit_nothing_is_waited_for(state: str) -> None:
    """Otherwise a plan in force would hang between two plans."""
    run = AFTER_COMMIT[state]()
    assert run.core.state == state
    said: list[SwitchEnded] = []
    while run.core.state != "settled":
        run.deadline(run.core.state, 2)
        assert run.logged()[0] == "switch.late"
        said += run.said(SwitchEnded)
    (ended,) = said
    assert ended.succeeded
    assert ended.report is not None
    assert f"{state} did not end within its time" in ended.report.notes


def test_what_is_not_started_at_the_end_of_a_switch_is_repaired() -> None:
    """Otherwise a StartReplica that came too late would leave requests held for ever."""
    run = activating()
    run.deadline("activating", 2)
    run.deadline("retiring", 2)
    hold(run, "prepared", "paused", taken=2)
    run.later()
    assert {"start r2@g0 e2", "start r2@g1 e2", "stop r0@g0 e2"} <= set(run.commands)


def test_a_new_rank_lost_after_the_commit_has_the_whole_replica_started_again() -> None:
    """Otherwise its other ranks would wait for one that cannot come back to them."""
    run = retiring()
    run.stopped("r0@g0", 2)
    run.stopped("r1@g1", 2)
    run.report("g0", hosted("r2", 2, rank=0, tp=2))
    run.report("g1", incarnation="i2")
    assert run.commands == ["stop r2@g0 e2"]
    run.stopped("r2@g0", 2)
    run.report("g0")
    run.later()
    assert run.commands == ["start r2@g0 e2", "start r2@g1 e2"]


def test_an_old_replica_that_dies_does_not_stop_the_switch() -> None:
    """Otherwise a dying GPU could never be switched away from; its requests are replayed."""
    spare = plan("SPARE", replica("r2", "g2"))
    run = Run(live=True).in_force(TWO, 1, "g2")
    run.adopt(spare, 1)
    run.write()
    run.planned()
    ready = msgspec.structs.replace(hosted("r2", 2, "prepared"), prepared=2)
    run.report("g2", ready)
    run.paused("r0@g0", 2)
    for _ in range(5):
        run.later()
        run.report("g0", hosted("r0", 2, "paused"))
        run.report("g2", ready)
    assert run.core.state == "taking"
    run.later()
    assert run.commands == ["take r2@g2 e2 of r0"]
    run.taken("r2@g2", 2)
    run.write()
    run.started("r2@g2", 2)
    run.stopped("r0@g0", 2)
    (ended,) = run.said(SwitchEnded)
    assert ended.report is not None
    assert ended.report.notes == ("r1 was lost: its requests are replayed",)


def test_one_of_eight_changes() -> None:
    """Otherwise seven replicas that have nothing to do with it would pause."""
    eight = [replica(f"r{i}", f"g{i}") for i in range(8)]
    run = Run(live=True).in_force(plan("8", *eight), 1, "g8")
    run.adopt(plan("8b", *eight[1:], replica("r8", "g8")), 1)
    run.write()
    heard = set(run.commands)
    run.planned()
    heard.update(run.commands)
    run.report("g8", msgspec.structs.replace(hosted("r8", 2, "prepared"), prepared=2))
    heard.update(run.commands)
    run.paused("r0@g0", 2)
    heard.update(run.commands)
    run.taken("r8@g8", 2)
    run.write()
    heard.update(run.commands)
    run.started("r8@g8", 2)
    heard.update(run.commands)
    run.stopped("r0@g0", 2)
    assert run.core.state == "settled"
    assert heard == {
        "prepare r8@g8 e2",
        "pause r0@g0 e2",
        "take r8@g8 e2 of r0",
        "start r8@g8 e2",
        "stop r0@g0 e2",
    }


def staying_taker() -> tuple[Run, DeploymentPlan]:
    """r1 goes without a successor: r0 stays, and is ready to take its requests."""
    one = plan("ONE", TWO.replicas[0])
    run = Run(live=True).in_force(TWO, 1)
    run.adopt(one, 1)
    run.write()
    run.planned()
    assert run.commands == ["prepare r0@g0 e2"]
    run.prepared("r0@g0", 2)
    assert run.commands == ["pause r1@g1 e2"]
    run.paused("r1@g1", 2)
    assert run.commands == ["take r0@g0 e2 of r1"]
    return run, one


def test_a_replica_that_stays_takes_requests_over() -> None:
    """Otherwise those of a replica that goes without a successor would be computed again."""
    run, one = staying_taker()
    run.taken("r0@g0", 2)
    run.write()
    assert run.commands == ["start r0@g0 e2"]
    run.started("r0@g0", 2)
    assert run.commands == ["stop r1@g1 e2"]
    run.stopped("r1@g1", 2)
    assert run.bucket == StoredPlan(epoch=2, in_force=one, target_epoch=2)
    assert run.core.state == "settled"


def test_a_staying_taker_is_told_to_forget_when_the_switch_fails() -> None:
    """Otherwise it would go on with requests that the old replica goes on with, too."""
    run, _ = staying_taker()
    run.report("g0", msgspec.structs.replace(hosted("r0", 1), prepared=2, taken=2))
    assert run.core.state == "committing"
    run, _ = staying_taker()
    run.deadline("taking", 2)
    run.write()
    assert sorted(run.commands) == ["resume r1@g1 e3", "start r0@g0 e3"]


STAGED = TransferPlanned(epoch=2, stages=((0, 2), (2, 3), (3, 4)))


def test_weights_that_do_not_fit_side_by_side_go_over_in_stages() -> None:
    """Otherwise old and new weights together would exceed the memory, or layers be freed that
    somebody still has to fetch."""
    run = preparing()
    run.planned(STAGED)
    assert run.said(PrepareReplica)[0].stages == 3
    hold(run, "prepared")
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    told = [run.commands]
    done = {"r0": 0, "r1": 0, "r2": 0}
    for who in (("r0", "r1"), ("r2",)) * 2:
        done.update({replica_id: done[replica_id] + 1 for replica_id in who})
        for rank in (0, 1):
            old, _ = _after_stage(rank, done[f"r{rank}"])
            _, new = _after_stage(rank, done["r2"])
            run.report(f"g{rank}", old, new)
        run.later()
        told.append(run.commands)
    assert told == [
        ["stage 1 r0@g0 e2", "stage 1 r1@g1 e2"],
        ["stage 1 r2@g0 e2"],
        ["stage 2 r0@g0 e2", "stage 2 r1@g1 e2"],
        ["stage 2 r2@g0 e2"],
        ["take r2@g0 e2 of r0,r1"],
    ]


def test_a_stage_says_which_layers_are_free() -> None:
    """Otherwise layers would be freed that somebody still has to fetch."""
    run = preparing()
    run.planned(STAGED)
    hold(run, "prepared")
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    assert {m.layers for m in run.said(AdvanceStage)} == {(0, 2)}
    for rank in (0, 1):
        run.report(f"g{rank}", *_after_stage(rank, 1))
    run.later()
    assert {m.layers for m in run.said(AdvanceStage)} == {(2, 3)}


def _after_stage(rank: int, stage: int) -> tuple[HostedReplica, HostedReplica]:
    old, new = hosted(f"r{rank}", 2, "paused"), hosted("r2", 2, "prepared", rank=rank, tp=2)
    return (
        msgspec.structs.replace(old, stage=stage),
        msgspec.structs.replace(new, stage=stage, prepared=2),
    )


def test_nothing_that_cannot_be_planned_is_tried() -> None:
    """Otherwise a model that is too large would fail its live switch for ever."""
    run = preparing()
    run.planned(TransferPlanned(epoch=2, failure="g0 lacks 3 GiB"))
    run.write()
    assert run.core.state == "rolling_back"
    assert not [command for command in run.commands if command.startswith("prepare")]
    for rank in (0, 1):
        run.started(f"r{rank}@g{rank}", 3)
        run.stopped(f"r2@g{rank}", 3)
    run.write()
    run.adopt(WIDE, 3)
    run.write()
    (started,) = run.said(SwitchStarted)
    assert started.way == "reload"
    assert "g0 lacks 3 GiB" in started.why
    assert run.core.state == "draining"


def test_a_plan_of_copies_for_another_switch_is_ignored() -> None:
    """Otherwise a late answer of the planner would have the wrong bytes copied."""
    run = preparing()
    run.step(TransferPlanned(epoch=1, failure="late"))
    assert (run.core.state, run.effects) == ("preparing", [])
    run.later()
    assert run.questions == [], "it is asked once"


def test_unanswered_commands_of_each_phase_are_sent_again() -> None:
    """Otherwise one lost message would cost a switch its deadline."""
    prepared: Callable[[], Run] = preparing
    for made, expected in (
        (prepared, ["prepare r2@g0 e2", "prepare r2@g1 e2"]),
        (pausing, ["pause r0@g0 e2", "pause r1@g1 e2"]),
        (taking, ["take r2@g0 e2 of r0,r1"]),
        (activating, ["start r2@g0 e2", "start r2@g1 e2"]),
        (retiring, ["stop r0@g0 e2", "stop r1@g1 e2"]),
    ):
        run = made()
        if run.core.state == "preparing":
            run.planned(PLANNED)
        run.later(0.3)
        assert run.commands == [], made
        run.later(0.2)
        assert run.commands == expected


def test_duplicates_and_events_of_other_epochs_change_nothing() -> None:
    """Otherwise a repeated or late answer would skip a phase."""
    run = pausing()
    run.prepared("r2@g0", 2)
    run.paused("r0@g0", 1)
    run.paused("r1@g1", 1)
    run.taken("r2@g0", 1)
    assert run.core.state == "pausing"
    run.paused("r0@g0", 2)
    run.paused("r0@g0", 2)
    assert run.core.state == "pausing"
    run.paused("r1@g1", 2)
    run.taken("r2@g0", 1)
    assert run.core.state == "taking"


def test_progress_is_told_at_each_phase_and_each_tick() -> None:
    """Otherwise whoever waits for a switch would not see whether it moves."""
    run = preparing()
    assert [p.phase for p in run.said(SwitchProgress)] == ["preparing"]
    run.planned(PLANNED)
    hold(run, "preparing", fetched_bytes=30)
    run.later(0.5)
    (progress,) = run.said(SwitchProgress)
    assert (progress.bytes_done, progress.bytes_total, progress.elapsed_s) == (30, 100, 0.5)
    run.prepared("r2@g0", 2)
    run.prepared("r2@g1", 2)
    assert [p.phase for p in run.said(SwitchProgress)] == ["pausing"]


@pytest.mark.parametrize(
    ("lives", "state"), [(preparing, "preparing"), (pausing, "pausing"), (taking, "taking")]
)
def test_a_new_switcher_walks_on_in_every_phase_before_the_commit(
    lives: Callable[[], Run], state: str
) -> None:
    """Otherwise a switcher killed in a switch would leave requests standing still."""
    before = lives()
    run = Run(live=True)
    assert before.bucket is not None
    run.loaded(before.bucket)
    assert run.core.state == "preparing"
    assert run.questions == [], "the mesh is not known yet"
    done = state != "preparing"
    hold(
        run,
        "prepared" if done else "preparing",
        "paused" if state == "taking" else "serving",
    )
    run.planned(PLANNED)
    assert run.core.state == state
    if state == "taking":
        assert run.commands == ["take r2@g0 e2 of r0,r1"]
        run.report(
            "g0",
            hosted("r0", 2, "paused"),
            msgspec.structs.replace(hosted("r2", 2, "prepared", tp=2), prepared=2, taken=2),
        )
        assert run.core.state == "committing"


def test_a_new_switcher_finishes_what_was_committed() -> None:
    """Otherwise requests would be held, and old replicas keep their memory, for ever."""
    run = Run(live=True)
    run.loaded(StoredPlan(epoch=2, in_force=WIDE, target_epoch=2))
    hold(run, "prepared", "paused", taken=2)
    run.later()
    assert run.core.state == "settled"
    assert set(run.commands) <= {
        "start r2@g0 e2", "start r2@g1 e2", "stop r0@g0 e2", "stop r1@g1 e2",
    }  # fmt: skip
    run.later()
    assert len(run.commands) == 4


def test_a_new_switcher_gives_up_when_requests_wait_for_a_rank_that_is_gone() -> None:
    """Otherwise they would wait for as long as a preparation may take."""
    run = Run(live=True)
    run.loaded(StoredPlan(epoch=1, in_force=TWO, target=WIDE, target_epoch=2, way="live"))
    ready = msgspec.structs.replace(hosted("r2", 2, "prepared", tp=2), prepared=2)
    run.report("g0", hosted("r0", 2, "paused"), ready)
    run.report("g1", hosted("r1", 1))
    assert run.core.state == "storing_target"
    run.write()
    assert "resume r0@g0 e3" in run.commands


def test_a_new_switcher_does_not_mix_its_stages_with_another_ones() -> None:
    """Otherwise it could free layers that were to be fetched later by the first plan."""
    run = Run(live=True)
    run.loaded(StoredPlan(epoch=1, in_force=TWO, target=WIDE, target_epoch=2, way="live"))
    hold(run, "preparing")
    run.planned(STAGED)
    assert run.core.state == "storing_target"


def test_a_second_switcher_that_commits_first_is_followed() -> None:
    """Otherwise ours would commit, or roll back, what is in force already."""
    run = taking()
    run.revision += 1
    run.bucket = StoredPlan(epoch=2, in_force=WIDE, target_epoch=2)
    run.taken("r2@g0", 2)
    run.write()
    assert run.core.state == "loading"
    run.loaded()
    assert run.core.state == "activating"
    run = taking()
    run.step(PlanInForce(epoch=4, plan=TWO))
    run.loaded(StoredPlan(epoch=4, in_force=TWO, target_epoch=4))
    assert run.core.state == "settled"


def test_a_live_switch_that_failed_is_tried_again_after_a_while() -> None:
    """Otherwise what cannot be moved would be tried again and again, each time with a pause; or
    one message that came late would cost a reload."""
    run = pausing()
    run.deadline("pausing", 2)
    run.write()
    for rank in (0, 1):
        run.started(f"r{rank}@g{rank}", 3)
        run.stopped(f"r2@g{rank}", 3)
    run.write()
    run.adopt(WIDE, 3)
    assert run.logged() == ["plan.refused"]
    run.now_s += CONFIG.refusal_s
    run.adopt(WIDE, 3)
    run.write()
    (started,) = run.said(SwitchStarted)
    assert started.way == "live"
    assert started.why == "live once more, for it failed: pausing did not end within its time"


def test_what_is_in_the_way_is_stopped_before_memory_is_asked_for() -> None:
    """Otherwise what a lost switch left behind would make the new replica fail."""
    run = Run(live=True).in_force(TWO, 1)
    run.report("g0", hosted("r0", 1), hosted("r2", 1, "prepared", tp=2))
    run.adopt(WIDE, 1)
    run.write()
    run.planned(PLANNED)
    assert run.commands == ["stop r2@g0 e2"]
    run.stopped("r2@g0", 2)
    assert run.commands == ["prepare r2@g0 e2", "prepare r2@g1 e2"]
    hold(run, "prepared")
    assert run.core.state == "pausing", "what was stopped for it is no loss"


def test_what_goes_without_having_served_is_stopped_first() -> None:
    """Otherwise its memory, which no plan of copies counts on, would be given away twice."""
    run = Run(live=True).in_force(TWO, 1)
    run.report("g1", hosted("r1", 1, "starting"))
    run.adopt(WIDE, 1)
    run.write()
    (asked,) = run.questions
    assert asked.leaving == TWO.replicas[:1]
    run.planned(PLANNED)
    assert run.commands == ["stop r1@g1 e2"]
    run.stopped("r1@g1", 2)
    assert run.commands == ["prepare r2@g0 e2", "prepare r2@g1 e2"]
    hold(run, "prepared")
    run.later()
    assert run.commands == ["pause r0@g0 e2"], "it has no requests"


def test_a_new_replica_must_have_as_much_room_as_an_old_one() -> None:
    """Otherwise it would refuse, for good, requests that were served before the switch."""
    run = Run(live=True).in_force(TWO, 1)
    token_bytes = SHAPE.layers * SHAPE.kv_heads * 2 * SHAPE.head_dim * SHAPE.item_bytes
    for rank, tokens in enumerate((1000, 600)):
        held = msgspec.structs.replace(hosted(f"r{rank}", 1), cache_bytes=tokens * token_bytes)
        run.report(f"g{rank}", held)
    run.adopt(WIDE, 1)
    run.write()
    assert run.questions[0].cache_tokens_min == 600


def test_a_repair_that_is_still_on_its_way_cannot_come_after_the_copies() -> None:
    """Otherwise what was started anew just before the switch would appear on a GPU that was
    taken for empty, beside what comes."""
    run = Run(live=True).in_force(TWO, 1)
    run.report("g1")
    run.adopt(WIDE, 1)
    run.write()
    run.planned(PLANNED)
    assert run.commands == ["stop r1@g1 e2"]
    run.later()
    assert run.commands == ["stop r1@g1 e2"], "until it is answered"
    run.stopped("r1@g1", 2)
    assert run.commands == ["prepare r2@g0 e2", "prepare r2@g1 e2"]


def test_nothing_is_planned_over_memory_that_nobody_has_told_of() -> None:
    """Otherwise a replica whose start was heard of, and its report not yet, would be taken for one
    without KV cache, and more would be laid beside it than fits."""
    run = Run(live=True).in_force(TWO, 1)
    run.report("g0", hosted("r0", 1, "starting"), memory_bytes=1 << 30)
    run.started("r0@g0", 1)
    run.adopt(WIDE, 1)
    run.write()
    assert not run.questions
    assert "switch.waits" in run.logged(), "an operator would see two minutes of nothing"
    known = msgspec.structs.replace(hosted("r0", 1), cache_bytes=1 << 20)
    run.report("g0", known, memory_bytes=1 << 30)
    assert run.questions[0].held["g0"].cache_bytes == 1 << 20


def test_an_engine_without_memory_of_its_own_is_planned_with() -> None:
    """Otherwise a switch of modelled engines on GPUs of a known size would wait for figures that
    never come, until it is too late."""
    run = Run(live=True).in_force(TWO, 1)
    run.report("g0", hosted("r0", 1), memory_bytes=1 << 30)
    run.adopt(WIDE, 1)
    run.write()
    assert run.questions[0].held["g0"].cache_bytes == 0


def test_a_report_that_comes_late_changes_nothing() -> None:
    """Otherwise a replica that serves would be taken for the one that it was, without its cache."""
    run = Run(live=True).in_force(TWO, 1)
    serving = msgspec.structs.replace(hosted("r0", 1), cache_bytes=1 << 20)
    run.report("g0", serving, number=7)
    run.report("g0", hosted("r0", 1), number=6)
    run.adopt(WIDE, 1)
    run.write()
    assert run.questions[0].held["g0"].cache_bytes == 1 << 20
    run = Run(live=True).in_force(TWO, 1)
    run.report("g0", serving, number=7)
    run.report("g0", incarnation="i2", number=1)
    run.adopt(WIDE, 1)
    run.write()
    assert run.questions[0].leaving == TWO.replicas[1:], "a new process counts anew"


def test_a_worker_that_refuses_to_prepare_rolls_back_at_once() -> None:
    """Otherwise one that hosts too much already would hold the switch up until its deadline."""
    run = preparing()
    run.planned(PLANNED)
    run.failed("r2@g1", 1, "late, of an earlier switch")
    assert run.core.state == "preparing"
    run.failed("r2@g1", 2, "hosts 4 replicas already")
    assert run.core.state == "storing_target"


def test_two_switchers_at_once_agree() -> None:
    """Otherwise each would walk its own way, and workers obey both."""
    ours = preparing()
    twin = Run(live=True)
    twin.bucket, twin.revision = ours.bucket, ours.revision
    twin.loaded()
    for rank in (0, 1):
        twin.report(f"g{rank}", hosted(f"r{rank}", 1))
    twin.planned(PLANNED)
    ours.planned(PLANNED)
    assert twin.commands == ours.commands == ["prepare r2@g0 e2", "prepare r2@g1 e2"]
    ours.deadline("preparing", 2)
    ours.write()
    assert ours.core.state == "rolling_back"
    hold(twin, "prepared")
    twin.paused("r0@g0", 2)
    twin.paused("r1@g1", 2)
    twin.taken("r2@g0", 2)
    assert twin.core.state == "committing"
    twin.bucket, twin.revision = ours.bucket, ours.revision
    (stale,) = [effect for effect in twin.effects if isinstance(effect, Store)]
    assert stale.revision < twin.revision, "it comes after our write, and does not pass"
    twin.write()
    twin.loaded()
    assert twin.core.state == "rolling_back"


def test_a_lost_broken_half_stops_the_other_half() -> None:
    """Otherwise the rank that is left would keep its GPU, and wait for a group that is gone."""
    run = Run(live=True).in_force(WIDE, 1)
    run.report("g1", hosted("r2", 1, "failed", rank=1, tp=2))
    assert run.commands == ["stop r2@g0 e1", "stop r2@g1 e1"]
    run.stopped("r2@g1", 1)
    run.report("g1")
    run.later()
    assert run.commands == ["stop r2@g0 e1"], "nobody starts before all have stopped"
    run.stopped("r2@g0", 1)
    run.report("g0")
    run.later()
    assert run.commands == ["start r2@g0 e1", "start r2@g1 e1"]


def test_a_replica_of_which_a_worker_is_away_is_not_started_in_halves() -> None:
    """Otherwise its other ranks would wait for it, and a rollback for them."""
    run = Run(live=True).in_force(WIDE, 1)
    for _ in range(5):
        run.later()
        run.report("g0", hosted("r2", 1, "failed", tp=2))
    run.stopped("r2@g0", 1)
    run.report("g0")
    run.later()
    assert run.commands == []
    run.report("g1", incarnation="i2")
    assert run.commands == ["start r2@g0 e1", "start r2@g1 e1"]


def test_other_weights_alone_are_no_work() -> None:
    """Otherwise a correction of weights would ask the planner, or pause somebody."""
    run = Run(live=True).in_force(TWO, 1)
    lean = msgspec.structs.replace(TWO, plan_id="L", weights={"*": {"r0": 0.9, "r1": 0.1}})
    run.adopt(lean, 1)
    run.write()
    assert (run.core.state, run.questions, run.commands) == ("committing", [], [])
    assert run.said(SwitchStarted)[0].way == "live"
    run.write()
    assert (run.core.state, run.commands) == ("settled", [])
