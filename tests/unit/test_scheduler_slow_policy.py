"""Scheduler core with a policy that decides now and then, and takes its time."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from services.scheduler.config import SchedulerConfig
from services.scheduler.core import INPUTS, Scheduler, SolveDeadline, Tick, inputs
from services.scheduler.policies.interface import Needs, Planned, Problem
from services.scheduler.policies.placing import place
from services.scheduler.policies.weights import equal, planned
from services.scheduler.solving import Solved, solve
from services.scheduler.wish import Wish
from shared import subjects
from shared.core import Effect, Log, Publish, Query, SetTimer, Start, Started
from shared.hardware import GpuSpec, Parallelism
from shared.mesh import MeshConfig, NodeSpec
from shared.messages.base import Message
from shared.messages.decisions import Decision
from shared.messages.demand import DemandReport, ForecastReport, TypeForecast
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PinPlan,
    PlanInForce,
    PlanKept,
    PlanProposed,
    ReleasePlan,
    ReplicaSpec,
)
from shared.messages.replicas import ReplicaReport, WorkerReport
from shared.models import ModelSpec
from shared.slo import DEFAULT_TARGETS, SloTarget

M = TypeVar("M", bound=Message)
MESH = MeshConfig(
    model=ModelSpec(model_id="m", profile="p"),
    more_models=(ModelSpec(model_id="other"),),
    nodes=(NodeSpec(node_id="n0", gpus=4),),
)
CONFIG = SchedulerConfig(policy="oserve", solve_timeout_s=20.0, watch_s=0.0)
EMPTY = DeploymentPlan(plan_id="none")


@dataclass
class Count:
    """A policy: so many replicas of one GPU, whatever is expected. At first there is one."""

    slow: bool
    period_s: float = 60.0
    replicas: int = 2
    problems: list[Problem] = field(default_factory=list[Problem])

    def start(self, problem: Problem) -> Planned:
        return self._placed(problem, 1)

    def plan(self, problem: Problem) -> Planned:
        self.problems.append(problem)
        if self.replicas < 0:
            raise ArithmeticError("no such number")
        return self._placed(problem, self.replicas)

    def _placed(self, problem: Problem, count: int) -> Planned:
        placed = place({("m", Parallelism()): count}, problem.offers, problem.in_force)
        return planned(placed.replicas, equal(placed.replicas), reason=f"count {count}")


class Run:
    """A scheduler with its plan of one replica in force, and its workers."""

    def __init__(self, policy: Count, config: SchedulerConfig = CONFIG) -> None:
        self.policy, self.now_s, self.epoch = policy, 100.0, 0
        self.alive = [f"n0-g{g}" for g in range(4)]
        self.core = Scheduler(config, MESH, policy)
        self.step(Started())
        self.in_force(EMPTY)
        self.in_force(self.adopted(self.second()))

    def step(self, event: Message | Query) -> list[Effect]:
        effects = self.core.step(event, self.now_s)  # type: ignore[arg-type]  # any of its events
        self.core.check()
        return effects

    def second(self, *, seconds: float = 1.0) -> list[Effect]:
        self.now_s += seconds
        for worker_id in self.alive:
            self.step(report(worker_id))
        return self.step(Tick())

    def seconds(self, count: int, *, forecasts: bool = False) -> None:
        for _ in range(count):
            if forecasts:
                self.forecast()
            self.second()

    def in_force(self, plan: DeploymentPlan) -> None:
        self.step(PlanInForce(epoch=self.epoch, plan=plan))
        self.epoch += 1

    def forecast(self, *, rps: float = 1.0) -> None:
        kind = TypeForecast(
            request_type=0, arrivals_rps=rps, input_tokens_mean=9.0, output_tokens_mean=9.0
        )
        made_at_s = self.now_s
        self.step(ForecastReport(model_id="m", made_at_s=made_at_s, horizon_s=60.0, types=(kind,)))

    @staticmethod
    def adopted(effects: list[Effect]) -> DeploymentPlan:
        (adopt,) = said(effects, AdoptPlan)
        return adopt.plan

    def start(self, effects: list[Effect]) -> Problem:
        (start,) = [effect for effect in effects if isinstance(effect, Start)]
        assert start.job == "solve"
        return start.argument

    def solved(self, problem: Problem) -> list[Effect]:
        return self.step(solve(self.policy, problem))


def report(worker_id: str, *, leaving: bool = False) -> WorkerReport:
    return WorkerReport(
        worker_id=worker_id, incarnation="i", node_id="n0", gpu=GpuSpec(gpu_id=worker_id),
        models=("m", "other"), leaving=leaving,
    )  # fmt: skip


def said(effects: list[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Publish) and isinstance(e.message, kind)]


def logs(effects: list[Effect]) -> list[str]:
    return [effect.event for effect in effects if isinstance(effect, Log)]


def test_serves_before_anything_is_expected() -> None:
    """Otherwise a new mesh would wait for its first forecast, which needs requests served."""
    run = Run(Count(slow=True))
    effects = run.second()
    assert "as wished: count 1" in said(effects, PlanKept)[0].reason
    assert run.core.content
    assert run.policy.problems == []


def test_a_forecast_that_cannot_be_is_none() -> None:
    """Otherwise a NaN from one type would reach every division of every policy."""
    run = Run(Count(slow=True))
    for rps in (float("nan"), float("inf"), -1.0, 0.0, 1e300):
        run.forecast(rps=rps)
        assert not [e for e in run.second() if isinstance(e, Start)]


def test_a_slow_policy_solves_outside_and_its_answer_is_wished_for() -> None:
    """Otherwise a search of seconds would hold up the word of every worker."""
    run = Run(Count(slow=True))
    run.forecast()
    effects = run.second()
    problem = run.start(effects)
    assert SetTimer(run.now_s + 20.0, SolveDeadline(started_s=run.now_s)) in effects
    assert [len(d.types) for d in problem.models] == [1, 0]
    assert problem.profiles == {"m": "p", "other": "other"}
    assert not run.core.content
    for _ in range(3):
        assert not [e for e in run.second() if isinstance(e, Start)], "one at a time"
    plan = run.adopted(run.solved(problem))
    assert len(plan.replicas) == 2
    assert run.adopted(run.second()) == plan, "repeated until in force"
    run.in_force(plan)
    assert said(run.second(), AdoptPlan) == []


def test_decides_each_period_and_when_a_forecast_comes_towards_its_end() -> None:
    """Otherwise it would decide on forecasts nearly a period old, or each second."""
    run = Run(Count(slow=False))
    run.forecast()
    run.in_force(run.adopted(run.second()))
    run.seconds(53, forecasts=True)
    assert len(run.policy.problems) == 1
    run.seconds(1, forecasts=True)
    assert len(run.policy.problems) == 2, "54 of 60 s after the last, with a new forecast"
    run.seconds(59)
    assert len(run.policy.problems) == 2
    run.seconds(1)
    assert len(run.policy.problems) == 3


def test_a_gpu_that_comes_or_goes_brings_the_decision_forward() -> None:
    """Otherwise a dead replica would stay in the plan for the rest of the period."""
    run = Run(Count(slow=False))
    run.forecast()
    plan = run.adopted(run.second())
    run.in_force(plan)
    lost = plan.replicas[0].gpus[0]
    assert lost not in {
        s.gpus[0] for s in run.adopted(run.step(report(lost, leaving=True))).replicas
    }
    run.alive.remove(lost)
    run.second(seconds=3.0)
    decided = len(run.policy.problems)
    run.alive.append(lost)
    run.second()
    run.second(seconds=1.5)
    assert len(run.policy.problems) == decided + 1


def test_an_answer_to_a_passed_epoch_is_dropped_and_asked_anew() -> None:
    """Otherwise the switcher would refuse it each second for a whole period."""
    run = Run(Count(slow=True))
    run.forecast()
    problem = run.start(run.second())
    run.in_force(DeploymentPlan(plan_id="elsewhere"))
    effects = run.solved(problem)
    assert said(effects, AdoptPlan) == []
    assert logs(effects) == ["solve.dropped"]
    assert run.start(run.second()).epoch == run.epoch - 1


def test_a_wish_against_a_passed_epoch_is_computed_anew() -> None:
    """Otherwise a rollback would leave the mesh with a wish that is refused for ever."""
    run = Run(Count(slow=False))
    run.forecast()
    plan = run.adopted(run.second())
    run.in_force(DeploymentPlan(plan_id="rolled back"))
    (adopt,) = said(run.second(), AdoptPlan)
    assert (adopt.plan.plan_id, adopt.based_on_epoch) == (plan.plan_id, run.epoch - 1)


def test_an_answer_that_names_a_gpu_gone_meanwhile_is_not_wished_for() -> None:
    """Otherwise a switch would start that can only fail."""
    run = Run(Count(slow=True, replicas=4))
    run.forecast()
    problem = run.start(run.second())
    run.alive.pop()
    run.second(seconds=3.0)
    effects = run.solved(problem)
    assert said(effects, AdoptPlan) == []
    assert "not on offer" in said(effects, PlanKept)[0].reason
    assert len(run.start(run.second()).offers) == 3


def test_a_policy_that_raises_costs_a_plan_and_not_the_service() -> None:
    """Otherwise one bad number would end the control plane, again at each restart."""
    for slow in (True, False):
        run = Run(Count(slow=slow, replicas=-1))
        run.forecast()
        effects = run.second()
        if slow:
            effects = run.solved(run.start(effects))
        assert "policy.failed" in logs(effects)
        (kept,) = said(effects, PlanKept)
        assert "ArithmeticError: no such number" in kept.reason
        assert "policy.failed" not in logs(run.second()), "asked again after a period only"


def test_a_policy_that_fails_leaves_no_replica_on_a_lost_gpu() -> None:
    """Otherwise a broken solver would also break what static placement survives."""
    run = Run(Count(slow=False, replicas=-1))
    run.forecast()
    run.second()
    run.alive.remove("n0-g0")
    run.second()
    effects = run.second(seconds=1.5)
    plan = run.adopted(effects)
    assert [spec.gpus for spec in plan.replicas] == [("n0-g1",)]


def test_a_solve_that_takes_too_long_is_given_up() -> None:
    """Otherwise a solver that hangs would silently end all planning."""
    run = Run(Count(slow=True))
    run.forecast()
    problem, started_s = run.start(run.second()), run.now_s
    run.now_s += 20.0
    late = SolveDeadline(started_s=started_s)
    effects = run.step(late)
    assert "no answer within 20 s" in said(effects, PlanKept)[0].reason
    assert run.step(late) == []
    assert not [e for e in run.second(seconds=60.0) if isinstance(e, Start)], "it still runs"
    assert logs(run.solved(problem)) == ["solve.dropped"]
    assert run.start(run.second())
    assert run.step(late) == [], "the deadline of an earlier solve"
    assert run.solved(problem)
    assert run.step(Solved(based_on_epoch=1)) == [], "an answer that nobody asked for"


def test_what_replicas_bear_is_heard_for_those_in_force_only() -> None:
    """Otherwise reports of replicas long gone would pile up, and mislead a reactive policy."""
    config = SchedulerConfig(policy="dynamo", target=SloTarget(ttft_s=1.0, tpot_s=0.2))
    run = Run(Count(slow=False), config)
    for id_, worker in (("m-tp1-0", "n0-g0"), ("m-tp1-0", "n0-g9"), ("else", "n0-g1")):
        run.step(
            ReplicaReport(
                replica_id=id_, worker_id=worker, incarnation="i", epoch=1, phase="serving"
            )
        )
    run.step(DemandReport(model_id="m", window_start_s=0.0, window_s=60.0))
    run.step(DemandReport(model_id="?", window_start_s=0.0, window_s=60.0))
    run.forecast()
    run.second()
    problem = run.policy.problems[0]
    assert [(r.replica_id, r.worker_id) for r in problem.loads] == [("m-tp1-0", "n0-g0")]
    assert [r.model_id for r in problem.observed] == ["m"]
    assert problem.targets == dict.fromkeys(("m", "other"), config.target)
    run.in_force(EMPTY)
    run.second(seconds=61.0)
    assert run.policy.problems[-1].loads == ()


def test_only_the_reactive_policy_hears_every_replica() -> None:
    """Otherwise the scheduler would handle ten messages a second of each replica for nothing."""
    assert inputs("oserve") == INPUTS
    assert subjects.REPLICA_REPORT in inputs("dynamo")
    assert subjects.REPLICA_FAILED not in inputs("dynamo")
    assert subjects.REPLICA_REPORT not in inputs("uniform")
    assert subjects.DEMAND_REPORT in inputs("uniform"), "what counts when forecasts cease"
    assert subjects.DEMAND_REPORT not in inputs("static")
    assert subjects.FORECAST_REPORT in inputs("static")


def test_a_gpu_is_offered_with_the_models_that_its_worker_has() -> None:
    """Otherwise a replica would be started where its checkpoint is not."""
    run = Run(Count(slow=True))
    run.step(msgspec.structs.replace(report("n0-g0"), models=("other", "unknown")))
    run.step(msgspec.structs.replace(report("n0-g1"), models=("unknown",)))
    run.forecast()
    offers = run.start(run.step(Tick())).offers
    assert {o.gpu_id: o.models for o in offers} == {
        "n0-g0": ("other",),
        "n0-g2": (),
        "n0-g3": (),
    }


def test_a_policy_is_told_what_the_operator_needs_and_how_long_replicas_stand() -> None:
    """Otherwise knobs would be accepted and change nothing, and what was just moved move again."""
    config = SchedulerConfig(
        policy="oserve",
        replicas_min={"m": 2, "other": 0},
        survive=1,
        elastic=True,
        gpu_prices={"h100": 2.5},
        target=SloTarget(ttft_s=3.0, tpot_s=0.2),
        class_targets={"batch": SloTarget(ttft_s=9.0, tpot_s=0.9)},
        watch_s=0.0,
    ).checked_for(("m", "other"))
    run = Run(Count(slow=False), config)
    run.seconds(5)
    run.forecast()
    plan = run.adopted(run.second())
    (problem,) = run.policy.problems
    assert problem.needs == Needs(
        replicas_min={"m": 2, "other": 0}, survive=1, elastic=True, gpu_prices={"h100": 2.5}
    )
    assert problem.class_targets == {
        "interactive": DEFAULT_TARGETS["interactive"],
        "standard": config.target,
        "batch": SloTarget(ttft_s=9.0, tpot_s=0.9),
    }
    assert problem.dwell_s == 6.0
    run.in_force(plan)
    run.seconds(20)
    leaning = {
        "*": {spec.replica_id: share for spec, share in zip(plan.replicas, (0.3, 0.7), strict=True)}
    }
    run.in_force(msgspec.structs.replace(plan, plan_id="leaning", weights=leaning))
    run.second(seconds=60.0)
    assert run.policy.problems[-1].dwell_s == 80.0, "weights alone are no change"


def test_another_weight_does_not_cost_a_solve() -> None:
    """Otherwise each correction would throw the slow policy's work away."""
    run = Run(Count(slow=True))
    run.forecast()
    problem = run.start(run.second())
    other = msgspec.structs.replace(problem.in_force, plan_id="same replicas")
    run.in_force(other)
    (adopt,) = said(run.solved(problem), AdoptPlan)
    assert adopt.based_on_epoch == run.epoch - 1, "in force now, not when the solve began"


def test_a_plan_that_takes_needed_replicas_away_is_dropped_if_there_are_gpus_for_them() -> None:
    """Otherwise a policy's slip would leave a model with less than its operator asked for."""
    for least, reason in ((2, "m has 1 of at least 2 replicas, and GPUs are free"), (1, "")):
        config = msgspec.structs.replace(CONFIG, replicas_min={"m": least, "other": 0})
        run = Run(Count(slow=False), config)
        run.forecast()
        run.in_force(run.adopted(run.second()))
        run.policy.replicas = 1
        effects = run.second(seconds=61.0)
        kept = "".join(message.reason for message in said(effects, PlanKept))
        assert reason in kept
        assert bool(said(effects, AdoptPlan)) is not bool(reason)


def test_a_plan_that_lacks_replicas_for_want_of_gpus_says_so() -> None:
    """Otherwise a mesh too small for its needs would be left without any plan."""
    config = msgspec.structs.replace(CONFIG, replicas_min={"m": 9, "other": 1})
    run = Run(Count(slow=True, replicas=4), config)
    run.forecast()
    plan = run.adopted(run.solved(run.start(run.second())))
    assert "m has 4 of at least 9 replicas; other has 0 of at least 1 replicas" in plan.reason


def test_figures_of_a_decision_are_passed_on() -> None:
    """Otherwise nobody could ask why afterwards."""

    class Tells(Count):
        def plan(self, problem: Problem) -> Planned:
            return replace(super().plan(problem), decision=Decision(policy="oserve", gap=0.5))

    run = Run(Tells(slow=True))
    run.forecast()
    effects = run.solved(run.start(run.second()))
    (proposed,) = said(effects, PlanProposed)
    assert proposed.decision == Decision(policy="oserve", gap=0.5)
    run.in_force(run.adopted(effects))
    (kept,) = said(run.solved(run.start(run.second(seconds=61.0))), PlanKept)
    assert kept.decision == Decision(policy="oserve", gap=0.5)


def test_the_same_reason_with_other_numbers_is_told_now_and_then() -> None:
    """Otherwise the journal would hold a kept plan for each decision of each day."""
    wish = Wish(keep_period_s=60.0)

    def told(why: str, now_s: float) -> bool:
        return bool(said(list(wish.keep(why, now_s=now_s, epoch=1, expected_rps=None)), PlanKept))

    assert told("a gain of 1.5 is no reason", 0.0)
    assert not told("a gain of 2 is no reason", 30.0)
    assert told("a gain of 3e-05 is no reason", 60.0)
    assert told("it does not pay back", 61.0), "of another kind"
    assert not told("it does not pay back", 500.0), "nothing new at all"


def test_a_plan_pinned_while_it_is_switched_to_outlives_its_release_nowhere() -> None:
    """Otherwise a pin that comes into force late, after its release, would hold for ever."""
    run = Run(Count(slow=False))
    run.forecast()
    spec = ReplicaSpec(replica_id="a", model_id="m", parallelism="tp1pp1", gpus=("n0-g3",))
    asked = DeploymentPlan(plan_id="", replicas=(spec,))
    pinned = run.adopted(run.step(Query(PinPlan(plan=asked), "cli")))
    run.step(Query(ReleasePlan(), "cli"))
    run.in_force(pinned)
    (adopt,) = said(run.second(), AdoptPlan)
    assert not adopt.plan.pinned
    assert run.policy.problems


def test_questions_that_nobody_can_answer_are_logged() -> None:
    """Otherwise a client that asks the wrong way would wait, and nobody know why."""
    run = Run(Count(slow=True))
    assert logs(run.step(ReleasePlan())) == ["scheduler.question_without_reply_address"]
    assert logs(run.step(Query(Tick(), "cli"))) == ["scheduler.question_unknown"]
