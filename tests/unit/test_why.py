"""`oserve why`: answers made of a mesh's events, and what they look like."""

import asyncio
import io
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from deploy.journal import Journal, Load, Past, ReplicaEvent, load_of, read_journal
from deploy.status import MeshStatus
from deploy.why_figures import switch_lines
from deploy.why_kept import why_not_switching
from deploy.why_plan import why_plan
from deploy.why_replica import why_replica
from deploy.why_view import kept_view, plan_view, replica_view
from shared import subjects
from shared.bus_memory import MemoryBus
from shared.clock import ManualClock
from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec
from shared.messages.base import encode
from shared.messages.decisions import (
    Decision,
    PlanOutlook,
    ReplicaOutlook,
    SwitchOutlook,
    TypeOutlook,
)
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import (
    DeploymentPlan,
    PlanInForce,
    PlanKept,
    PlanProposed,
    ReplicaSpec,
    SwitchEnded,
    SwitchStarted,
)
from shared.messages.replicas import (
    HostedReplica,
    ReplicaFailed,
    ReplicaPhase,
    ReplicaReport,
    ReplicaStarted,
    ReplicaStopped,
    WorkerReport,
)

NOW_S = 1_780_000_000.0
MODEL = "llama-2-70b"
BIG = ReplicaSpec(
    replica_id="big", model_id=MODEL, parallelism="tp4pp1", gpus=("g0", "g1", "g2", "g3")
)
SMALL = tuple(
    ReplicaSpec(
        replica_id=f"s{i}",
        model_id=MODEL,
        parallelism="tp2pp1",
        gpus=(f"g{4 + 2 * i}", f"g{5 + 2 * i}"),
    )
    for i in range(2)
)
PLAN = DeploymentPlan(
    plan_id="plan-new",
    replicas=(BIG, *SMALL),
    weights={"*": {"big": 0.5, "s0": 0.25, "s1": 0.25}, "0": {"s0": 0.5, "s1": 0.5}},
    reason="longer prompts suit tp4",
)
FORMER = DeploymentPlan(plan_id="plan-old", replicas=SMALL, weights={"*": {"s0": 0.5, "s1": 0.5}})
NEW_OUTLOOK = PlanOutlook(
    plan="1 x tp4, 2 x tp2", gpus=8, headroom=1.8, lateness=0.42, goodput_share=0.97, why="chosen"
)
OLD_OUTLOOK = PlanOutlook(plan="2 x tp2", gpus=4, headroom=1.1, lateness=0.9)
WORSE = PlanOutlook(plan="4 x tp2", gpus=8, headroom=2.0, lateness=0.55, why="31 % later")
PAYS = SwitchOutlook(
    seconds=48.0, served_share=0.5, bytes_moved=1.4e11, busiest_link_s=5.5, requests_paused=12.0,
    gain=120.0, cost=30.0, payback_s=75.0, horizon_s=300.0, moves=True, why="pays back",
)  # fmt: skip
DOES_NOT = msgspec.structs.replace(
    PAYS, gain=10.0, cost=30.0, payback_s=900.0, moves=False, why="pays back too late"
)


def _type(name: str, *, arrivals_rps: float, input_tokens: float) -> TypeOutlook:
    return TypeOutlook(
        model_id=MODEL, request_type=name, arrivals_rps=arrivals_rps, arrivals_rps_p10=1.5,
        arrivals_rps_p90=2.5, input_tokens=input_tokens, output_tokens=200.0, ttft_s_mean=0.2,
        tpot_s_mean=0.03,
    )  # fmt: skip


DECISION = Decision(
    policy="oserve",
    goal="headroom",
    objective=1.8,
    bound=1.8,
    gap=0.0,
    optimal=True,
    solve_s=0.04,
    horizon_s=300.0,
    types=(
        _type("0", arrivals_rps=2.0, input_tokens=1000.0),
        _type("1", arrivals_rps=0.5, input_tokens=8000.0),
    ),
    replicas=(
        ReplicaOutlook(
            replica_id="big", model_id=MODEL, parallelism="tp4pp1", gpus=BIG.gpus,
            utilisation=0.6, arrivals_rps={"1": 0.5}, rates_rps={"0": 8.0, "1": 0.9},
        ),
        *(
            ReplicaOutlook(
                replica_id=spec.replica_id, model_id=MODEL, parallelism="tp2pp1", gpus=spec.gpus,
                utilisation=0.4, arrivals_rps={"0": 1.0}, rates_rps={"0": 2.6, "1": 0.1},
            )
            for spec in SMALL
        ),
    ),
    chosen=NEW_OUTLOOK,
    in_force=OLD_OUTLOOK,
    alternatives=(WORSE,),
    switch=PAYS,
    bottleneck="big is the bottleneck",
    advice=("one more GPU would bring 12 %",),
)  # fmt: skip


OTHER = msgspec.structs.replace(DECISION, policy="another")


def _proposed(at_s: float, plan: DeploymentPlan, decision: Decision | None) -> Past[PlanProposed]:
    event = PlanProposed(plan=plan, based_on_epoch=1, reason=plan.reason, decision=decision)
    return Past(at_s, event)


def _window(at_s: float, **requests: tuple[int, float, float]) -> Past[DemandReport]:
    """Ten seconds that began at ``at_s``: by type its requests, TTFT and TPOT."""
    report = DemandReport(
        model_id=MODEL,
        window_start_s=at_s,
        window_s=10.0,
        types=tuple(
            TypeDemand(
                request_type=int(name.removeprefix("t")), requests=count, arrivals_rps=count / 10,
                input_tokens_mean=1100.0, output_tokens_mean=210.0, input_tokens_centroid=1.0,
                output_tokens_centroid=1.0, ttft_s_mean=ttft_s, tpot_s_mean=tpot_s,
            )
            for name, (count, ttft_s, tpot_s) in requests.items()
        ),
    )  # fmt: skip
    return Past(at_s + 10.0, report)


def _status(plan: PlanInForce | None) -> MeshStatus:
    """A mesh in which ``big`` runs on four workers of one node, and g3 is still starting it."""
    hosted: dict[str, ReplicaPhase] = {
        gpu: "starting" if gpu == "g3" else "serving" for gpu in BIG.gpus
    }
    workers = tuple(
        WorkerReport(
            worker_id=gpu, incarnation="i", node_id="n0", gpu=GpuSpec(gpu_id=gpu, kind="h100"),
            replicas=(HostedReplica(replica_id="big", epoch=4, phase=phase, rank=rank),),
        )
        for rank, (gpu, phase) in enumerate(hosted.items())
    )  # fmt: skip
    return MeshStatus(
        bus_url="nats://b", url="", services=(), workers=workers, replicas=(), plan=plan
    )


IN_FORCE = PlanInForce(epoch=4, plan=PLAN)


def _journal(plan: PlanInForce = IN_FORCE, **changes: Any) -> Journal:
    """plan-old, then plan-new 100 s ago, in force for 50 s, with a window on either side."""
    journal = Journal(
        now_s=NOW_S,
        status=_status(plan),
        proposed=(_proposed(NOW_S - 900, FORMER, None), _proposed(NOW_S - 100, PLAN, DECISION)),
        started=(
            Past(
                NOW_S - 99,
                SwitchStarted(epoch=4, plan_id=PLAN.plan_id, replicas_starting=("big",)),
            ),
        ),
        ended=(
            _ended(NOW_S - 850, "plan-old", epoch=3, took_s=9.0),
            _ended(NOW_S - 50, PLAN.plan_id, epoch=4, took_s=49.0),
        ),
        demand=(
            _window(NOW_S - 60, t0=(1000, 9.0, 9.0)),  # began before: mixes both plans
            _window(NOW_S - 40, t0=(10, 0.1, 0.03)),
            _window(NOW_S - 30, t0=(30, 0.3, 0.03), t2=(5, 0.2, 0.02)),
        ),
    )
    return replace(journal, **changes)


def _ended(
    at_s: float, plan_id: str, *, epoch: int, took_s: float, failure: str = ""
) -> Past[SwitchEnded]:
    return Past(
        at_s,
        SwitchEnded(
            epoch=epoch, plan_id=plan_id, succeeded=not failure, took_s=took_s, detail=failure
        ),
    )


def _shown(view: RenderableType, *, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, color_system=None).print(view)
    shown = text.getvalue()
    assert "…" not in shown, f"a column was cut short:\n{shown}"
    assert max(map(len, shown.splitlines())) <= width
    return shown


# oserve why plan


def test_the_plan_and_what_led_to_it() -> None:
    """An operator would see another plan's reason, or none."""
    answer = why_plan(_journal(now_s=NOW_S + 60.0), IN_FORCE)
    assert answer.decision == DECISION
    assert (answer.plan, answer.gpus) == ("1 x tp4, 2 x tp2", 8)
    assert (answer.proposed_at_s, answer.in_force_since_s) == (NOW_S - 100, NOW_S - 50)
    assert answer.switch is not None
    assert (answer.switch.took_s, answer.switch.starting) == (49.0, ("big",))
    assert answer.notes == ()


def test_predicted_against_actual() -> None:
    """A prediction that is off would be hidden: by the time before the switch, or by small windows
    that count as much as large ones."""
    answer = why_plan(_journal(), IN_FORCE)
    assert answer.seen_s == 20.0
    by_type = {row.request_type: row for row in answer.types}
    assert sorted(by_type) == ["0", "1", "2"]
    seen, predicted = by_type["0"].seen, by_type["0"].predicted
    assert seen is not None
    assert predicted is not None
    assert by_type["0"].requests == 40
    assert seen.arrivals_rps == pytest.approx(40 / 20)
    assert seen.ttft_s_mean == pytest.approx((10 * 0.1 + 30 * 0.3) / 40)
    assert seen.tpot_s_mean == pytest.approx(0.03)
    assert (predicted.arrivals_rps, predicted.ttft_s_mean) == (2.0, 0.2)
    assert by_type["1"].seen is None, "expected, and never came"
    assert by_type["2"].predicted is None, "came, and was not expected"


def test_new_weights_do_not_hide_why_the_replicas_stand() -> None:
    """After a correction of weights nothing would be known any more, and nothing be compared."""
    weighted = msgspec.structs.replace(PLAN, plan_id="plan-weights", weights={"*": {"big": 1.0}})
    journal = _journal()
    in_vain = msgspec.structs.replace(FORMER, plan_id="plan-in-vain")
    journal = _journal(
        proposed=(
            *journal.proposed,
            _proposed(NOW_S - 9, in_vain, OTHER),
            _proposed(NOW_S - 5, weighted, None),
            _proposed(NOW_S - 1, in_vain, OTHER),
        ),
        ended=(*journal.ended, _ended(NOW_S - 4, "plan-weights", epoch=5, took_s=0.1)),
    )
    answer = why_plan(journal, PlanInForce(epoch=5, plan=weighted))
    assert answer.decision == DECISION
    assert (answer.decided_by, answer.in_force_since_s) == ("plan-new", NOW_S - 4)
    assert answer.seen_s == 20.0
    assert "figures: those of plan-new" in _shown(plan_view(answer))


def test_figures_of_other_replicas_are_not_taken() -> None:
    """A plan without figures would be explained by those of the plan before."""
    other = msgspec.structs.replace(PLAN, plan_id="plan-x", replicas=SMALL)
    journal = _journal(
        proposed=(_proposed(NOW_S - 100, PLAN, DECISION), _proposed(NOW_S - 5, other, None))
    )
    answer = why_plan(journal, PlanInForce(epoch=5, plan=other))
    assert answer.decision is None
    assert "'oserve'" in answer.notes[0]


def test_a_plan_without_figures_is_explained_by_those_with_which_it_was_kept() -> None:
    """The first plan of a mesh, made before anything was expected, would never be compared with
    what comes; or be explained by a decision about another plan."""
    journal = _journal(
        proposed=(_proposed(NOW_S - 100, PLAN, None),),
        kept=(
            Past(NOW_S - 120, PlanKept(epoch=3, reason="before", decision=OTHER)),
            Past(NOW_S - 48, PlanKept(epoch=4, reason="no forecast")),
            Past(NOW_S - 41, PlanKept(epoch=4, reason="stays", decision=DECISION)),
            Past(NOW_S - 20, PlanKept(epoch=4, reason="stays", decision=OTHER)),
        ),
    )
    answer = why_plan(journal, IN_FORCE)
    assert (answer.decision, answer.kept) == (DECISION, True)
    assert answer.seen_s == 20.0
    shown = _shown(plan_view(answer))
    assert "figures: those with which it was first kept" in shown
    assert "250 ms (+25%)" in shown


@pytest.mark.parametrize(
    ("journal", "in_force", "said"),
    [
        (
            _journal(proposed=(), started=(), ended=(), demand=()),
            IN_FORCE,
            "the journal is empty",
        ),
        (_journal(proposed=()), IN_FORCE, "bus.journal_age_s_max"),
        (_journal(unreadable=3), IN_FORCE, "3 events"),
        (_journal(demand=()), IN_FORCE, "profiler.window_s"),
        (_journal(), IN_FORCE, "the replicas are new"),
        (
            _journal(proposed=(_proposed(NOW_S - 100, PLAN, None),)),
            PlanInForce(epoch=4, plan=msgspec.structs.replace(PLAN, pinned=True)),
            "`oserve release`",
        ),
        (
            _journal(proposed=()),
            PlanInForce(epoch=0, plan=DeploymentPlan(plan_id="")),
            "nothing serves yet",
        ),
    ],
)
def test_what_is_not_known_is_said(journal: Journal, in_force: PlanInForce, said: str) -> None:
    """An operator would take a gap for an answer."""
    answer = why_plan(journal, in_force)
    assert any(said in note for note in answer.notes), answer.notes
    assert said in _shown(plan_view(answer)).replace("\n", " ")


def test_wide_figures_cut_no_name_short() -> None:
    """An operator could not tell which type is meant."""
    wide = msgspec.structs.replace(
        DECISION.types[0], request_type="12", arrivals_rps=0.987, arrivals_rps_p10=0.484,
        ttft_s_mean=0.0523, tpot_s_mean=0.0283, input_tokens=3256.0, output_tokens=1160.0,
    )  # fmt: skip
    decision = msgspec.structs.replace(DECISION, types=(wide,))
    journal = _journal(
        proposed=(_proposed(NOW_S - 100, PLAN, decision),),
        demand=(_window(NOW_S - 30, t12=(38, 0.0655, 0.0285)),),
    )
    shown = _shown(plan_view(why_plan(journal, IN_FORCE)))
    assert "65.5 ms (+25%)" in shown
    assert "28.5 ms (+1%)" in shown


def test_the_plan_on_a_terminal() -> None:
    """Figures that are cut off, or that stand without units, cannot be read."""
    shown = _shown(plan_view(why_plan(_journal(), IN_FORCE)))
    for text in (
        "Plan plan-new, epoch 4",
        "1 x tp4, 2 x tp2, 8 GPUs",
        "the switch took 49 s (48 s expected): started big",
        "2 (1.5 to 2.5)",
        "250 ms (+25%)",
        "31 % later",
        "pays back after 75 s",
        "big is the bottleneck",
        "one more GPU",
        "proven optimal",
    ):
        assert text in shown, shown


# oserve why not-switching


def _kept(at_s: float, decision: Decision | None, reason: str = "does not pay") -> Past[PlanKept]:
    return Past(at_s, PlanKept(epoch=4, reason=reason, decision=decision))


def test_the_last_decision_to_keep_and_what_would_change_it() -> None:
    """An operator who waits for a switch would not learn that none will come."""
    stays = msgspec.structs.replace(DECISION, in_force=OLD_OUTLOOK, switch=DOES_NOT)
    journal = _journal(
        kept=(
            _kept(NOW_S - 800, None, "an earlier plan's"),
            _kept(NOW_S - 30, None, "no forecast"),
            _kept(NOW_S - 10, stays),
        )
    )
    answer = why_not_switching(journal, IN_FORCE)
    assert (answer.reason, answer.times, answer.kept_since_s) == ("does not pay", 2, NOW_S - 30)
    assert answer.moving == ""
    said, larger, cheaper, longer, served = answer.would_change
    assert "pays back too late" in said
    assert "3 times as large" in larger
    assert "about 16 s instead of 48 s" in cheaper
    assert "15 min instead of 5 min" in longer
    assert "50 % of the demand" in served
    shown = _shown(kept_view(answer))
    assert "Nothing moves: 1 x tp4, 2 x tp2 stays" in shown
    assert "why: does not pay" in shown
    assert "not worth it: pays back too late" in shown


def test_the_best_plan_is_in_force() -> None:
    """It would look as if the scheduler had not compared anything."""
    best = msgspec.structs.replace(DECISION, in_force=NEW_OUTLOOK, switch=None)
    answer = why_not_switching(_journal(kept=(_kept(NOW_S - 10, best),)), IN_FORCE)
    assert "are the best that was found" in answer.would_change[0]
    assert "4 x tp2, would have to be less late than 0.42" in answer.would_change[1]


def test_a_rival_that_is_no_better_says_so() -> None:
    """A division by no gain would crash, or promise a switch for nothing."""
    worse = msgspec.structs.replace(DOES_NOT, gain=-3.0, payback_s=None)
    decision = msgspec.structs.replace(DECISION, switch=worse)
    answer = why_not_switching(_journal(kept=(_kept(NOW_S - 10, decision),)), IN_FORCE)
    assert "less lateness" in answer.would_change[0]
    assert "never pays back" in _shown(kept_view(answer))


def test_a_live_switch_says_for_how_long_it_pauses() -> None:
    """Its seconds alone would read as if nothing were served meanwhile."""
    live = msgspec.structs.replace(PAYS, pause_s=0.29, served_share=1.0)
    assert any("takes 48 s live, with a pause of 290 ms" in line for line in switch_lines(live))
    assert not any("live" in line for line in switch_lines(PAYS))


def test_what_holds_back_a_switch_that_pays() -> None:
    """An operator would be told to want more gain, where gain is not what lacks."""
    held = msgspec.structs.replace(PAYS, moves=False, why="the replicas stand for 20 s only")
    decision = msgspec.structs.replace(DECISION, switch=held)
    answer = why_not_switching(_journal(kept=(_kept(NOW_S - 10, decision),)), IN_FORCE)
    assert "stand for 20 s only" in answer.would_change[0]


@pytest.mark.parametrize(
    ("rolled_back", "switching_to", "said"),
    [
        (False, "plan-next", "a switch to plan-next (2 x tp2) is under way"),
        (False, "", "has not begun"),
        (True, "", "rolled back: g4 is gone"),
    ],
)
def test_that_something_is_about_to_move(rolled_back: bool, switching_to: str, said: str) -> None:
    """An old decision to keep would be shown while the mesh switches."""
    wanted = msgspec.structs.replace(FORMER, plan_id="plan-next")
    failed = _ended(NOW_S - 1, "plan-next", epoch=5, took_s=3.0, failure="g4 is gone")
    base = _journal()
    journal = _journal(
        kept=(_kept(NOW_S - 40, DECISION),),
        proposed=(*base.proposed, _proposed(NOW_S - 4, wanted, DECISION)),
        ended=(*base.ended, *((failed,) if rolled_back else ())),
    )
    in_force = PlanInForce(epoch=4, plan=PLAN, switching_to=switching_to)
    answer = why_not_switching(journal, in_force)
    assert said in answer.moving
    assert answer.reason == ""
    assert "About to move" in _shown(kept_view(answer))


def test_a_plan_that_came_into_force_is_not_about_to_come() -> None:
    """Right after a switch the answer would be that it is still to begin."""
    answer = why_not_switching(_journal(), IN_FORCE)
    assert answer.moving == ""
    assert "policy_period_s" in answer.notes[0]


def test_a_pinned_plan_stays_because_of_a_person() -> None:
    """Figures would be given as the cause, where a person is."""
    pinned = PlanInForce(epoch=4, plan=msgspec.structs.replace(PLAN, pinned=True))
    answer = why_not_switching(_journal(kept=(_kept(NOW_S - 10, DECISION),)), pinned)
    assert answer.would_change == ()
    assert "`oserve release`" in answer.notes[0]


# oserve why replica

REPORT = ReplicaReport(
    replica_id="big", worker_id="g0", incarnation="i", epoch=4, phase="serving", running=3,
    running_max=256, waiting_max=1024, kv_blocks_used=50, kv_blocks_total=100,
    requests_total=10, output_tokens_total=1000, step_s=0.03,
)  # fmt: skip


def _started(at_s: float, gpu: str, epoch: int = 4) -> Past[ReplicaEvent]:
    return Past(at_s, ReplicaStarted(epoch=epoch, worker_id=gpu, replica_id="big"))


def test_a_replica_and_its_place_in_the_plan() -> None:
    """An operator could not tell what a replica is there for."""
    load = Load(report=REPORT, listened_s=3.0, requests_rps=0.4, output_tokens_per_s=80.0)
    answer = why_replica(_journal(load=load), IN_FORCE, "big")
    assert (answer.in_plan, answer.gpus, answer.kinds) == (True, BIG.gpus, ("h100",))
    assert answer.shares == {"*": 0.5, "0": 0.0}
    assert answer.outlook == DECISION.replicas[0]
    assert answer.phases["g3"] == "starting"
    assert "of type 1 it could serve 0.225 requests/s per GPU" in answer.why[2]
    assert "tp2 0.05" in answer.why[2]
    assert "instead of 4 x tp2: 31 % later" in answer.why
    shown = _shown(replica_view(answer))
    for text in ("tp4 of llama-2-70b", "g3 is starting", "60 %", "3 of 256", "50 %", "80"):
        assert text in shown, shown


def test_what_all_gpus_of_a_replica_told_is_one_event() -> None:
    """A start on eight GPUs would fill the screen, and a restart be lost among them."""
    events = (
        *(_started(NOW_S - 90 + i, gpu) for i, gpu in enumerate(BIG.gpus)),
        Past(
            NOW_S - 60,
            ReplicaFailed(epoch=4, worker_id="g0", replica_id="big", detail="out of memory"),
        ),
        *(_started(NOW_S - 50 + i, gpu) for i, gpu in enumerate(BIG.gpus)),
        _started(NOW_S - 20, "g0"),  # again, though nobody said that it failed
    )
    answer = why_replica(_journal(replica=events), IN_FORCE, "big")
    assert [event.what for event in answer.events] == ["started", "failed", "started", "started"]
    assert answer.events[0].gpus == BIG.gpus
    assert (answer.starts, answer.failures) == (3, 1)
    shown = _shown(replica_view(answer))
    assert "g0, g1, g2, g3" in shown
    assert "out of memory" in shown


def test_a_replica_that_is_gone() -> None:
    """Whoever looks for yesterday's replica would be told that it never was."""
    smaller = msgspec.structs.replace(PLAN, plan_id="plan-3", replicas=SMALL, reason="big is idle")
    stopped: Past[ReplicaEvent] = Past(
        NOW_S - 3, ReplicaStopped(epoch=5, worker_id="g0", replica_id="big")
    )
    journal = _journal(
        proposed=(_proposed(NOW_S - 100, PLAN, DECISION), _proposed(NOW_S - 5, smaller, None)),
        replica=(stopped,),
    )
    answer = why_replica(journal, PlanInForce(epoch=5, plan=smaller), "big")
    assert not answer.in_plan
    assert answer.why == ("plan-3 (2 x tp2) left it out: big is idle",)
    assert "not in the plan in force" in _shown(replica_view(answer))


def test_a_replica_that_nobody_knows() -> None:
    """A typing error would get an empty table."""
    with pytest.raises(ConfigInvalid, match="the plan in force has: big, s0, s1"):
        why_replica(_journal(), IN_FORCE, "bog")


def test_shares_are_of_the_replicas_own_model() -> None:
    """With two models a replica that gets all of its own would seem to get half."""
    other = msgspec.structs.replace(SMALL[0], model_id="qwen")
    plan = msgspec.structs.replace(
        PLAN, replicas=(BIG, other), weights={"*": {"big": 0.5, "s0": 0.5}}
    )
    answer = why_replica(_journal(), PlanInForce(epoch=4, plan=plan), "big")
    assert answer.shares == {"*": 1.0}


# The journal


def test_rates_of_a_replica_that_was_listened_to() -> None:
    """A restart of its leader would show as a negative rate, one report as a division by zero."""
    later = msgspec.structs.replace(REPORT, requests_total=16, output_tokens_total=1300)
    load = load_of([(5.0, REPORT), (8.0, later)])
    assert load is not None
    assert (load.requests_rps, load.output_tokens_per_s) == (2.0, 100.0)
    assert load.report is later
    restarted = msgspec.structs.replace(REPORT, incarnation="j", requests_total=0)
    for reports in ([(5.0, REPORT)], [(5.0, REPORT), (8.0, restarted)]):
        load = load_of(reports)
        assert load is not None
        assert load.requests_rps is None
    assert load_of([]) is None


def test_the_journal_is_read_from_the_bus() -> None:
    """Events of other replicas would be mixed in, or one that cannot be read would end it all."""

    async def main() -> None:
        clock = ManualClock(NOW_S)
        bus = MemoryBus(clock=clock)
        window = _window(NOW_S).message
        ended = _ended(NOW_S, "plan-new", epoch=4, took_s=1.0).message
        stopped = ReplicaStopped(epoch=4, worker_id="g0", replica_id="big")
        other = ReplicaStarted(epoch=4, worker_id="g4", replica_id="s0")
        started = ReplicaStarted(epoch=4, worker_id="g0", replica_id="big")
        sent = (
            subjects.PLAN_PROPOSED.send(PlanProposed(plan=PLAN, based_on_epoch=1, reason="r")),
            subjects.PLAN_KEPT.send(PlanKept(epoch=4, reason="k")),
            subjects.SWITCH_STARTED.send(SwitchStarted(epoch=4, plan_id="plan-new")),
            subjects.SWITCH_ENDED.send(ended),
            subjects.DEMAND_REPORT.send(window),
            subjects.REPLICA_STOPPED.send(stopped, replica_id="big"),
            subjects.REPLICA_STARTED.send(started, replica_id="big"),
            subjects.REPLICA_STARTED.send(other, replica_id="s0"),
        )
        for publish in sent:
            clock.time_s += 1.0
            await bus.publish(publish.subject, encode(publish.message))
        await bus.publish(subjects.PLAN_KEPT.pattern, b"of another age")
        journal = await read_journal(bus, _status(IN_FORCE), now_s=NOW_S + 9, replica_id="big")
        assert [past.at_s for past in journal.proposed] == [NOW_S + 1]
        assert journal.proposed[0].message.plan == PLAN
        assert len(journal.kept) == len(journal.started) == len(journal.ended) == 1
        assert journal.demand[0].message == window
        assert [type(past.message) for past in journal.replica] == [ReplicaStopped, ReplicaStarted]
        assert journal.unreadable == 1
        none = await read_journal(bus, _status(IN_FORCE), now_s=NOW_S + 9)
        assert none.replica == ()

    asyncio.run(main())
