"""Switcher core: a switch from wish to plan in force, and everything on that way that can fail."""

import itertools

import msgspec

from services.switcher.core import NOTHING
from services.switcher.events import Tick
from shared.core import Draining, Load, Loaded, Publish, SetTimer, Store
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PlanInForce,
    StoredPlan,
    SwitchEnded,
    SwitchStarted,
)
from tests.unit.switcher_runs import CONFIG, A, B, Run, hosted, plan, replica


def walking(epoch: int = 1) -> Run:
    """A is in force and served by g0; the switch to B on g1 has been stored."""
    run = Run().in_force(A, epoch, "g1")
    run.adopt(B, epoch)
    run.write()
    return run


def starting() -> Run:
    """The same, after r0 was drained and stopped."""
    run = walking()
    run.drained("r0@g0", 2)
    run.stopped("r0@g0", 2)
    return run


def test_start_loads_the_plan() -> None:
    """Otherwise a switcher would decide without knowing what is in force."""
    run = Run()
    assert run.effects == [Load("plan", StoredPlan), SetTimer(10.5, Tick())]
    assert run.core.state == "loading"


def test_an_empty_bucket_gets_the_empty_plan() -> None:
    """Otherwise a new mesh would have no epoch to base its first plan on."""
    run = Run()
    assert run.loaded() == [Store("plan", NOTHING, 0)]
    run.write()
    assert run.core.state == "settled"
    assert run.said(PlanInForce) == [PlanInForce(epoch=0, plan=NOTHING.in_force)]


def test_a_switch_from_wish_to_plan_in_force() -> None:
    """Otherwise no plan would ever be walked to in the order drain, stop, start, commit."""
    run = Run().in_force(A, 1, "g1")
    run.adopt(B, 1)
    target = StoredPlan(epoch=1, in_force=A, target=B, target_epoch=2)
    assert run.effects == [Store("plan", target, 1)], "the bucket hears of it before any worker"
    run.write()
    assert run.said(SwitchStarted) == [
        SwitchStarted(
            epoch=2,
            plan_id="B",
            replicas_stopping=("r0",),
            replicas_starting=("r1",),
            way="reload",
            why="g0 cannot move the weights of m",
        )
    ]
    assert run.said(PlanInForce)[0].switching_to == "B"
    assert run.commands == ["drain r0@g0 e2"]
    assert run.deadlines == [("draining", CONFIG.drain_timeout_s + CONFIG.drain_grace_s)]
    run.drained("r0@g0", 2)
    assert run.commands == ["stop r0@g0 e2"]
    assert run.deadlines == [("stopping", CONFIG.stop_timeout_s)]
    run.stopped("r0@g0", 2)
    assert run.commands == ["start r1@g1 e2"]
    assert run.deadlines == [("starting", CONFIG.start_timeout_s)]
    run.now_s += 3.0
    run.report("g1", hosted("r1", 2))
    assert run.effects == [
        Store("plan", StoredPlan(epoch=2, in_force=B, target_epoch=2), run.revision)
    ]
    run.write()
    assert run.core.state == "settled"
    (ended,) = run.said(SwitchEnded)
    assert (ended.epoch, ended.plan_id, ended.succeeded, ended.took_s) == (2, "B", True, 3.0)
    assert ended.report is not None
    assert {k: s for k, s in ended.report.phase_s.items() if s} == {"starting": 3.0}
    assert run.said(PlanInForce) == [PlanInForce(epoch=2, plan=B)]


def test_replicas_equal_in_both_plans_are_not_touched() -> None:
    """Otherwise adding a replica would interrupt those that already serve."""
    run = Run().in_force(A, 1, "g1")
    both = plan("AB", *A.replicas, *B.replicas)
    run.adopt(both, 1)
    run.write()
    assert run.commands == ["start r1@g1 e2"]


def test_all_ranks_stop_and_start() -> None:
    """Otherwise a tensor-parallel replica would be left in halves."""
    wide = plan("W", replica("r0", "g0", "g1"))
    other = plan("V", replica("r0", "g1", "g2"))
    run = Run().in_force(wide, 1, "g2")
    run.adopt(other, 1)
    run.write()
    assert run.commands == ["drain r0@g0 e2"], "only the leader drains"
    run.drained("r0@g0", 2)
    assert run.commands == ["stop r0@g0 e2", "stop r0@g1 e2"]
    run.stopped("r0@g1", 2)
    assert run.core.state == "stopping"
    run.stopped("r0@g0", 2)
    assert run.commands == ["start r0@g1 e2", "start r0@g2 e2"]
    run.report("g1", hosted("r0", 2, rank=0, tp=2))
    assert run.core.state == "starting"
    run.report("g2", hosted("r0", 2, rank=1, tp=2))
    assert run.core.state == "committing"


def test_unanswered_commands_are_sent_again() -> None:
    """Otherwise one lost message would hang a switch until its deadline."""
    run = walking()
    run.later(0.3)
    assert run.commands == []
    run.later(0.2)
    assert run.commands == ["drain r0@g0 e2"]


def test_a_late_drain_is_cut_short() -> None:
    """Otherwise one endless request could hold up a new plan for ever."""
    run = walking()
    run.deadline("draining", 2)
    assert run.commands == ["stop r0@g0 e2"]
    assert run.logged() == ["switch.late"]


def test_deadlines_of_a_phase_that_ended_are_ignored() -> None:
    """Otherwise an old timer would stop or roll back a switch that goes well."""
    run = starting()
    assert run.deadline("draining", 2) == []
    assert run.deadline("starting", 1) == []
    assert run.core.state == "starting"


def test_a_vanished_worker_counts_as_drained_and_stopped() -> None:
    """Otherwise a plan that replaces a dead GPU would wait for the dead."""
    run = walking()
    for _ in range(5):
        run.later()
        run.report("g1")
    assert run.core.state == "starting"


def test_answers_of_an_older_epoch_do_not_count() -> None:
    """Otherwise a late answer from the last switch would free a GPU that is still in use."""
    run = walking()
    run.drained("r0@g0", 1)
    assert run.core.state == "draining"
    run.drained("r0@g0", 2)
    run.stopped("r0@g0", 1)
    assert run.core.state == "stopping"


def test_a_failed_start_rolls_back_under_a_new_epoch() -> None:
    """Otherwise a plan that cannot start would leave nothing serving, and its late commands
    could still be obeyed."""
    run = starting()
    run.report("g1", hosted("r1", 2, "starting"))
    run.failed("r1@g1", 2, "no memory")
    back = StoredPlan(epoch=1, in_force=A, target=A, target_epoch=3)
    assert run.effects[-1] == Store("plan", back, run.revision)
    run.write()
    assert run.commands == ["stop r1@g1 e3", "start r0@g0 e3"]
    run.stopped("r1@g1", 3)
    run.report("g0", hosted("r0", 3))
    assert run.effects == [
        Store("plan", StoredPlan(epoch=3, in_force=A, target_epoch=3), run.revision)
    ]
    run.write()
    (ended,) = run.said(SwitchEnded)
    assert (ended.epoch, ended.plan_id, ended.succeeded) == (2, "B", False)
    assert "r1 failed on g1: no memory" in ended.detail
    assert run.said(PlanInForce) == [PlanInForce(epoch=3, plan=A)]


def test_late_stops_and_starts_roll_back() -> None:
    """Otherwise a worker that never answers would leave the mesh between two plans."""
    for run, state in ((walking(), "stopping"), (starting(), "starting")):
        if state == "stopping":
            run.drained("r0@g0", 2)
        run.deadline(state, 2)
        run.write()
        assert run.core.state == "rolling_back"


def test_a_worker_that_vanishes_while_starting_rolls_back_at_once() -> None:
    """Otherwise nothing would serve until the long deadline of a start."""
    run = starting()
    for _ in range(5):
        run.report("g0")
        run.later()
    assert run.core.state == "storing_target"
    run.write()
    assert run.commands == ["start r0@g0 e3"]


def test_a_switcher_that_stood_still_does_not_take_silence_for_absence() -> None:
    """Held for longer than workers may be silent, it would roll back a switch that goes well."""
    run = starting()
    run.now_s += 2 * CONFIG.worker_timeout_s
    run.step(Tick())
    assert run.core.state == "starting"
    for _ in range(5):
        run.later()
    assert run.core.state == "storing_target", "who is silent from then on is absent"


def test_a_rollback_resumes_what_only_drained() -> None:
    """Otherwise a replica that was merely drained would refuse requests for ever."""
    wide = plan("AC", *A.replicas, replica("r2", "g2"))
    run = Run().in_force(wide, 1, "g1")
    run.adopt(B, 1)
    run.write()
    run.drained("r0@g0", 2)
    run.report("g0", hosted("r0", 2, "draining"))
    run.drained("r2@g2", 2)
    run.stopped("r2@g2", 2)
    run.deadline("stopping", 2)
    run.write()
    assert run.commands == ["resume r0@g0 e3", "start r2@g2 e3", "stop r1@g1 e3"]


def test_a_late_rollback_commits_and_leaves_the_rest_to_repair() -> None:
    """Otherwise a worker that cannot be restored would block every further plan."""
    run = starting()
    run.deadline("starting", 2)
    run.write()
    run.deadline("rolling_back", 3)
    run.write()
    assert run.core.state == "settled"
    assert run.said(PlanInForce)[0].epoch == 3
    assert run.commands == ["start r0@g0 e3"]


def test_a_failed_plan_is_refused_for_a_while() -> None:
    """Otherwise a wish repeated each second would drain the same replicas each second."""
    run = starting()
    run.deadline("starting", 2)
    run.write()
    run.deadline("rolling_back", 3)
    run.write()
    run.adopt(B, 3)
    assert run.logged() == ["plan.refused"]
    run.adopt(B, 3)
    assert run.effects == [], "it is told once"
    run.now_s += CONFIG.refusal_s
    run.adopt(B, 3)
    assert run.core.state == "storing_target"


def test_an_epoch_is_never_used_twice() -> None:
    """Otherwise workers could not tell a new command from one of a failed switch."""
    run = starting()
    run.deadline("starting", 2)
    run.write()
    run.deadline("rolling_back", 3)
    run.write()
    run.now_s += CONFIG.refusal_s
    run.adopt(B, 3)
    (store,) = [effect for effect in run.effects if isinstance(effect, Store)]
    assert isinstance(store.message, StoredPlan)
    assert store.message.target_epoch == 4


def test_epochs_stay_above_those_that_workers_speak_of() -> None:
    """Otherwise commands after a lost bucket would be refused by every worker as outdated."""
    run = Run().settled("g1")
    run.report("g0", hosted("r9", 41))
    run.adopt(A, 0)
    run.write()
    assert run.commands == ["stop r9@g0 e42"]


def test_wishes_on_a_past_epoch_are_refused_once_aloud() -> None:
    """Otherwise a late wish would undo the plan that came after it, or flood the log."""
    run = Run().in_force(A, 5)
    run.adopt(B, 4)
    assert run.logged() == ["plan.refused"]
    assert run.core.state == "settled"
    assert run.adopt(B, 4) == []


def test_a_wish_for_what_is_in_force_or_under_way_changes_nothing() -> None:
    """Otherwise the scheduler's repetition would restart the switch each second."""
    run = walking()
    assert run.adopt(B, 1) == []
    assert run.adopt(A, 1) == []
    run.adopt(plan("C", replica("r5", "g1")), 1)
    assert run.logged() == ["plan.refused"]
    assert run.core.state == "draining"


def test_an_impossible_plan_is_refused() -> None:
    """Otherwise a bug in a policy would start two replicas on one GPU."""
    run = Run().in_force(A, 1, "g1")
    twice = plan("X", replica("r1", "g1"), replica("r2", "g1"))
    wide = DeploymentPlan(plan_id="Y", replicas=A.replicas, weights={"*": {"ghost": 1.0}})
    narrow = msgspec.structs.replace(replica("r1", "g1"), parallelism="tp2pp1")
    short = DeploymentPlan(plan_id="Z", replicas=(narrow,))
    same = plan("S", replica("r1", "g1"), replica("r1", "g2"))
    for wrong in (twice, wide, short, same):
        run.adopt(wrong, 1)
        assert run.logged() == ["plan.refused"], wrong
        assert run.core.state == "settled"


def test_repairs_what_differs_from_the_plan_in_force() -> None:
    """Otherwise a worker that restarts would stay empty, and a forgotten replica keep a GPU."""
    run = Run().in_force(A, 3, "g1")
    run.report("g0", incarnation="i2")
    assert run.commands == ["start r0@g0 e3"]
    run.report("g1", hosted("r7", 2))
    assert run.commands == ["stop r7@g1 e3"]
    run.later(0.6)
    assert run.commands == ["stop r7@g1 e3", "start r0@g0 e3"]


def test_a_replica_of_another_model_is_replaced() -> None:
    """After a lost bucket or half a switch, one model's requests would be answered by another."""
    run = Run().in_force(A, 3)
    run.report("g0", msgspec.structs.replace(hosted("r0", 3), model_id="other"))
    assert run.commands == ["stop r0@g0 e3"]
    run.stopped("r0@g0", 3)
    run.report("g0")
    run.later()
    assert run.commands == ["start r0@g0 e3"]
    run.report("g0", msgspec.structs.replace(hosted("r0", 3), model_id="m"))
    run.later()
    assert run.commands == []


def test_a_broken_replica_is_stopped_then_started_ever_more_rarely() -> None:
    """Otherwise an engine that crashes would stay down, or one that always crashes would spin."""
    run = Run().in_force(A, 1)
    run.report("g0", hosted("r0", 1, "failed"))
    assert run.commands == ["stop r0@g0 e1"]
    for _ in range(3):
        run.failed("r0@g0", 1, "illegal memory access")
    run.stopped("r0@g0", 1)
    starts: list[float] = []
    for _ in range(20):
        run.report("g0")
        run.later()
        starts += [run.now_s for command in run.commands if command == "start r0@g0 e1"]
    gaps = {after - before for before, after in itertools.pairwise(starts)}
    assert gaps == {CONFIG.command_retry_s * 2.0**3}


def test_a_rank_that_stood_still_while_the_others_broke_is_started_anew() -> None:
    """Taken for a new one, it would not join the others again: they would wait for it in vain."""
    wide = plan("W", replica("r0", "g0", "g1"))
    run = Run().in_force(wide, 1)
    for _ in range(5):
        run.report("g0", hosted("r0", 1, tp=2))
        run.later()
    weighted = msgspec.structs.replace(wide, plan_id="W2", weights={"chat": {"r0": 1.0}})
    run.adopt(weighted, 1)
    run.write()
    run.write()
    assert run.core.state == "settled"
    run.failed("r0@g0", 2, "RankLost")
    run.report("g0", hosted("r0", 2, "failed", tp=2))
    assert run.commands == ["stop r0@g0 e2"]
    run.stopped("r0@g0", 2)
    run.report("g0")
    assert run.commands == []
    run.report("g1", hosted("r0", 1, rank=1, tp=2))
    run.later()
    assert run.commands == ["stop r0@g1 e2"]
    run.stopped("r0@g1", 2)
    run.report("g0")
    run.report("g1")
    run.later()
    assert run.commands == ["start r0@g0 e2", "start r0@g1 e2"]


def test_a_repair_that_hangs_is_tried_again() -> None:
    """Otherwise an engine stuck in loading after a worker's restart would never serve again."""
    run = Run().in_force(A, 1)
    run.report("g0", hosted("r0", 1, "starting"), incarnation="i2")
    run.now_s += CONFIG.start_timeout_s
    run.report("g0", hosted("r0", 1, "starting"), incarnation="i2")
    run.later()
    assert run.commands == ["stop r0@g0 e1"]
    run.stopped("r0@g0", 1)
    run.later()
    assert run.commands == ["start r0@g0 e1"]


def test_a_drained_replica_of_the_plan_in_force_is_resumed() -> None:
    """Otherwise a late drain would take a replica out of service until the next plan."""
    run = Run().in_force(A, 2)
    run.report("g0", hosted("r0", 2, "draining"))
    assert run.commands == ["resume r0@g0 e2"]


def test_a_leaving_worker_is_not_repaired() -> None:
    """Otherwise an orderly shutdown would be fought replica by replica."""
    run = Run().in_force(A, 2)
    run.drained("r0@g0", 2)
    assert run.commands == [], "the answers of a leaving worker come before it says so"
    run.report("g0", hosted("r0", 2, "draining"), leaving=True)
    assert run.commands == []


def test_before_the_first_plan_nothing_is_stopped() -> None:
    """Otherwise a lost bucket would empty every GPU before the scheduler could speak."""
    run = Run().settled()
    run.report("g0", hosted("r0", 3))
    assert run.commands == []


def test_a_new_switcher_walks_on_where_the_old_one_died() -> None:
    """Otherwise a switcher killed in a switch would leave the mesh between two plans."""
    run = Run()
    run.loaded(StoredPlan(epoch=1, in_force=A, target=B, target_epoch=2))
    assert run.core.state == "draining"
    assert run.commands == ["drain r0@g0 e2"]
    run.report("g0")
    assert run.core.state == "stopping"
    run.stopped("r0@g0", 2)
    run.report("g1", hosted("r1", 2))
    assert run.core.state == "committing"


def test_a_new_switcher_goes_on_with_a_rollback() -> None:
    """Otherwise a rollback interrupted by a crash would be taken for a switch."""
    run = Run()
    run.loaded(StoredPlan(epoch=1, in_force=A, target=A, target_epoch=3))
    assert run.core.state == "rolling_back"
    run.report("g0", hosted("r0", 1))
    assert run.commands == ["start r0@g0 e3"], "so that it refuses what is still under way"
    run.started("r0@g0", 3)
    run.write()
    (ended,) = run.said(SwitchEnded)
    assert not ended.succeeded


def test_a_lost_race_is_followed() -> None:
    """Otherwise two switchers would each believe in their own plan."""
    run = Run().in_force(A, 1, "g1")
    run.adopt(B, 1)
    run.revision += 1
    run.bucket = StoredPlan(epoch=4, in_force=B, target_epoch=4)
    run.write()
    assert (run.core.state, run.loads) == ("loading", 1)
    assert run.adopt(B, 1) == []
    run.loaded()
    assert run.core.state == "settled"
    assert run.said(PlanInForce) == [PlanInForce(epoch=4, plan=B)]


def test_a_race_lost_to_a_switch_of_the_same_epoch_is_followed() -> None:
    """Otherwise the loser would walk to its own target and put that in force instead."""
    run = Run().in_force(A, 1, "g1")
    run.adopt(B, 1)
    run.revision += 1
    other = plan("C", replica("r2", "g1"))
    run.bucket = StoredPlan(epoch=1, in_force=A, target=other, target_epoch=2)
    run.write()
    run.loaded()
    assert run.core.state == "draining"
    run.drained("r0@g0", 2)
    run.stopped("r0@g0", 2)
    assert run.commands == ["start r2@g1 e2"]


def test_our_own_write_reported_as_a_lost_race_succeeds() -> None:
    """Otherwise a write whose answer was lost would end its switch without a word."""
    run = starting()
    run.report("g1", hosted("r1", 2))
    (store,) = [effect for effect in run.effects if isinstance(effect, Store)]
    assert isinstance(store.message, StoredPlan)
    run.bucket, run.revision = store.message, run.revision + 1
    run.write()
    run.loaded()
    assert [ended.succeeded for ended in run.said(SwitchEnded)] == [True]


def test_a_later_epoch_from_elsewhere_is_looked_up() -> None:
    """Otherwise a switcher that slept would go on repeating and repairing a plan long past."""
    run = Run().in_force(A, 1)
    run.step(PlanInForce(epoch=1, plan=A))
    assert run.effects == []
    run.step(PlanInForce(epoch=2, plan=B))
    assert (run.core.state, run.loads) == ("loading", 1)
    assert run.step(PlanInForce(epoch=2, plan=B)) == [], "one question is enough"


def test_a_target_written_by_a_switcher_that_died_is_found() -> None:
    """Otherwise it would lie in wait, to be walked to when nobody wishes for it any more."""
    run = Run().in_force(A, 1, "g1")
    run.revision += 1
    run.bucket = StoredPlan(epoch=1, in_force=A, target=B, target_epoch=2)
    run.later(1.0)
    assert (run.core.state, run.loads) == ("settled", 1)
    run.loaded()
    assert (run.core.state, run.loads) == ("loading", 1)
    run.loaded()
    assert (run.core.state, run.commands) == ("draining", ["drain r0@g0 e2"])


def test_looks_at_the_bucket_do_not_pile_up() -> None:
    """Otherwise each second without the broker would add one that tries again for ever."""
    run = Run().in_force(A, 1)
    assert [(run.later(1.0), run.loads)[1] for _ in range(3)] == [1, 0, 0]
    assert run.loaded() == []
    run.later(1.0)
    assert (run.core.state, run.loads) == ("settled", 1)


def test_a_look_overtaken_by_a_switch_changes_nothing() -> None:
    """Otherwise the switch would start over, or end, by what the bucket held before it."""
    run = Run().in_force(A, 1, "g1")
    run.later(1.0)
    run.adopt(B, 1)
    run.write()
    assert run.core.state == "draining"
    before = StoredPlan(epoch=1, in_force=A, target_epoch=1)
    assert run.step(Loaded(key="plan", message=before, revision=1)) == []
    assert run.core.state == "draining"


def test_a_wiped_bucket_is_filled_from_memory() -> None:
    """Otherwise wiping the broker's store would stop every replica that serves."""
    run = Run().in_force(A, 6)
    run.step(PlanInForce(epoch=9, plan=B))
    run.bucket, run.revision = None, 0
    run.loaded()
    run.write()
    assert run.bucket == StoredPlan(epoch=6, in_force=A, target_epoch=6)
    assert run.core.state == "settled"


def test_the_plan_in_force_is_repeated_each_second() -> None:
    """Otherwise a router that missed it would route by the old plan for ever."""
    run = Run().in_force(A, 1)
    assert run.later(0.5) != []
    assert run.said(PlanInForce) == []
    run.later(0.5)
    assert run.said(PlanInForce) == [PlanInForce(epoch=1, plan=A)]


def test_a_report_older_than_an_answer_is_not_believed() -> None:
    """Otherwise a late report would make the switcher stop the replica it just started."""
    run = starting()
    run.report("g1", hosted("r1", 2))
    run.write()
    run.stopped("r1@g1", 2)
    assert run.report("g1", hosted("r1", 1)) == [], "stopped since: nothing new to repair"


def test_a_new_incarnation_has_to_start_again() -> None:
    """Otherwise a worker that crashed after starting would be committed empty."""
    wide = plan("W", replica("r1", "g1", "g2"))
    run = Run().in_force(A, 1, "g1", "g2")
    run.adopt(wide, 1)
    run.write()
    run.drained("r0@g0", 2)
    run.stopped("r0@g0", 2)
    run.report("g1", hosted("r1", 2, tp=2))
    run.report("g1", incarnation="i2")
    run.later()
    assert "start r1@g1 e2" in run.commands
    run.report("g2", hosted("r1", 2, rank=1, tp=2))
    assert run.core.state == "starting"


def test_another_replica_in_the_way_is_stopped_before_the_start() -> None:
    """Otherwise a worker that slept through the stops would hold two replicas on one GPU."""
    run = starting()
    run.report("g1", hosted("r9", 1))
    run.later()
    assert run.commands == ["stop r9@g1 e2"]


def test_ends_without_a_word() -> None:
    """Otherwise shutdown would wait, though whoever starts next walks on."""
    assert walking().step(Draining()) == []


def test_wishes_are_ignored_until_the_bucket_has_answered() -> None:
    """Otherwise a switcher just started could start a switch on top of one under way."""
    assert Run().step(AdoptPlan(plan=A, based_on_epoch=0)) == []


def test_other_weights_alone_touch_no_worker() -> None:
    """Otherwise a correction of weights, each few seconds, would drain what it wants to help."""
    two = (replica("r0", "g0"), replica("r1", "g1"))
    even = plan("even", *two)
    run = Run().in_force(even, 1)
    leaning = msgspec.structs.replace(
        even, plan_id="leaning", weights={"*": {"r0": 0.4, "r1": 0.6}}
    )
    told = [*run.adopt(leaning, 1), *run.write(), *run.write()]
    assert run.core.state == "settled", "two writes, and nobody else is waited for"
    assert run.bucket == StoredPlan(epoch=2, in_force=leaning, target_epoch=2)
    sent = [type(effect.message) for effect in told if isinstance(effect, Publish)]
    assert sent == [SwitchStarted, PlanInForce, SwitchEnded, PlanInForce]
    assert run.commands == []
    run.now_s += 0.6
    run.report("g0", hosted("r0", 1))
    run.report("g1", hosted("r1", 1))
    run.step(Tick())
    assert run.commands == [], "that they serve under an older epoch is no difference"
