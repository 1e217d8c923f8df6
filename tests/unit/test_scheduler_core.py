"""Scheduler core: events in, effects out."""

from typing import TypeVar

import pytest

from services.scheduler.config import SchedulerConfig
from services.scheduler.core import Scheduler, Tick
from shared.core import Draining, Effect, Load, Loaded, Log, Publish, SetTimer, Started
from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec
from shared.mesh import MeshConfig, NodeSpec, ReplicaWish
from shared.messages.base import Message
from shared.messages.demand import ForecastReport, TypeForecast
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PlanInForce,
    PlanKept,
    PlanProposed,
    StoredPlan,
)
from shared.messages.replicas import WorkerReport
from shared.models import ModelSpec

M = TypeVar("M", bound=Message)
EMPTY = DeploymentPlan(plan_id="none")
MESH = MeshConfig(
    model=ModelSpec(model_id="m"),
    nodes=(NodeSpec(node_id="n0", gpus=2), NodeSpec(node_id="n1", gpus=1)),
    replicas=(
        ReplicaWish(replica_id="r0", gpus=("n0-g0",)),
        ReplicaWish(replica_id="r1", gpus=("n0-g1",)),
    ),
)


def report(worker_id: str, *, leaving: bool = False, model: str = "m") -> WorkerReport:
    return WorkerReport(
        worker_id=worker_id,
        incarnation="i1",
        node_id=worker_id.partition("-")[0],
        gpu=GpuSpec(gpu_id=worker_id),
        models=(model,),
        leaving=leaving,
    )


def said(effects: list[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Publish) and isinstance(e.message, kind)]


class Run:
    """A scheduler, and workers that report each second."""

    def __init__(self, mesh: MeshConfig = MESH) -> None:
        self.core = Scheduler(SchedulerConfig(), mesh)
        self.now_s = 100.0
        self.alive = ["n0-g0", "n0-g1", "n1-g0"]
        self.step(Started())

    def step(self, event: Message) -> list[Effect]:
        effects = self.core.step(event, self.now_s)  # type: ignore[arg-type]  # any of its events
        self.core.check()
        return effects

    def second(self) -> list[Effect]:
        """One period: everyone alive reports, then the scheduler decides."""
        self.now_s += 1.0
        for worker_id in self.alive:
            self.step(report(worker_id))
        return self.step(Tick())

    def in_force(self, plan: DeploymentPlan, epoch: int) -> None:
        self.step(PlanInForce(epoch=epoch, plan=plan))

    def adopted(self) -> DeploymentPlan:
        """Run until a plan is wished for, and put it in force."""
        self.in_force(EMPTY, 0)
        (adopt,) = said(self.second(), AdoptPlan)
        self.in_force(adopt.plan, 1)
        return adopt.plan


def test_start_loads_the_plan_and_sets_the_period() -> None:
    """Otherwise a restarted scheduler would not know what is in force, or never decide."""
    core = Scheduler(SchedulerConfig(), MESH)
    assert core.step(Started(), 5.0) == [Load("plan", StoredPlan), SetTimer(6.0, Tick())]


def test_wishes_for_the_topology_and_repeats_it_until_in_force() -> None:
    """Otherwise nothing would ever serve, or one lost message would lose the plan."""
    run = Run()
    run.in_force(EMPTY, 0)
    first = run.second()
    (adopt,) = said(first, AdoptPlan)
    (proposed,) = said(first, PlanProposed)
    assert adopt.based_on_epoch == 0
    assert proposed.plan == adopt.plan
    assert {spec.replica_id: spec.gpus for spec in adopt.plan.replicas} == {
        "r0": ("n0-g0",),
        "r1": ("n0-g1",),
    }
    assert [e.event for e in first if isinstance(e, Log)] == ["plan.proposed"]
    second = run.second()
    assert said(second, AdoptPlan) == [adopt]
    assert said(second, PlanProposed) == []
    run.in_force(adopt.plan, 1)
    third = run.second()
    assert said(third, AdoptPlan) == []
    (kept,) = said(third, PlanKept)
    assert kept.epoch == 1
    assert "as wished" in kept.reason
    assert said(run.second(), PlanKept) == []


def test_waits_for_the_plan_in_force_before_wishing() -> None:
    """Otherwise a scheduler that starts first would wish against a plan it does not know."""
    run = Run()
    assert said(run.second(), AdoptPlan) == []


def test_waits_at_start_for_all_workers_but_not_for_ever() -> None:
    """Otherwise a restart would move replicas off workers that merely had not reported yet."""
    run = Run()
    run.alive = ["n0-g0"]
    run.in_force(EMPTY, 0)
    for _ in range(4):
        assert said(run.second(), AdoptPlan) == []
    (adopt,) = said(run.second(), AdoptPlan)
    assert [spec.replica_id for spec in adopt.plan.replicas] == ["r0"]


def test_recovers_from_the_bucket_without_hearing_the_switcher() -> None:
    """Otherwise a restart during an outage of the switcher would forget what is in force."""
    run = Run()
    plan = Run().adopted()
    stored = StoredPlan(epoch=7, in_force=plan)
    run.step(Loaded(key="plan", message=stored, revision=3))
    effects = run.second()
    assert said(effects, AdoptPlan) == []
    (kept,) = said(effects, PlanKept)
    assert kept.epoch == 7


def test_a_vanished_worker_is_planned_around() -> None:
    """Otherwise a dead GPU would take its replica with it although another one is free."""
    run = Run()
    run.adopted()
    run.alive.remove("n0-g1")
    assert said(run.second(), AdoptPlan) == []
    assert said(run.second(), AdoptPlan) == []
    (adopt,) = said(run.second(), AdoptPlan)
    assert adopt.based_on_epoch == 1
    assert {s.replica_id: s.gpus for s in adopt.plan.replicas}["r1"] == ("n1-g0",)
    assert "r1 moves from n0-g1 to n1-g0" in adopt.plan.reason


def test_a_leaving_worker_is_planned_around_at_once() -> None:
    """Otherwise an orderly shutdown would cost the seconds of a crash."""
    run = Run()
    run.adopted()
    effects = run.step(report("n0-g1", leaving=True))
    (adopt,) = said(effects, AdoptPlan)
    assert {s.replica_id: s.gpus for s in adopt.plan.replicas}["r1"] == ("n1-g0",)


def test_an_appeared_worker_has_to_settle() -> None:
    """Otherwise a worker that flickers would be planned onto at each appearance."""
    run = Run()
    run.alive = ["n0-g0"]
    run.in_force(EMPTY, 0)
    for _ in range(5):
        effects = run.second()
    (adopt,) = said(effects, AdoptPlan)  # type: ignore[possibly-undefined]
    run.in_force(adopt.plan, 1)
    run.alive = ["n0-g0", "n0-g1"]
    assert said(run.second(), AdoptPlan) == []
    (adopt,) = said(run.second(), AdoptPlan)
    assert [spec.replica_id for spec in adopt.plan.replicas] == ["r0", "r1"]


def test_without_any_worker_the_plan_is_kept_and_it_says_so() -> None:
    """Otherwise a short outage of everything would wipe the plan that it returns to."""
    run = Run()
    run.adopted()
    run.second()
    run.alive = []
    told = [kept for _ in range(5) for kept in said(run.second(), PlanKept)]
    assert "nothing can be placed" in told[-1].reason
    assert run.core.wish is None


def test_a_worker_without_the_model_is_not_planned_onto() -> None:
    """Otherwise the replica would be started where its checkpoint is not."""
    run = Run()
    run.in_force(EMPTY, 0)
    run.alive = ["n0-g0", "n1-g0"]
    run.step(report("n0-g1", model="other"))
    (adopt,) = said(run.second(), AdoptPlan)
    assert {s.replica_id: s.gpus for s in adopt.plan.replicas}["r1"] == ("n1-g0",)


def test_a_late_plan_in_force_is_ignored_unless_ours_fell_silent() -> None:
    """Otherwise a late message would rewind the scheduler, or an emptied bucket block it."""
    run = Run()
    plan = run.adopted()
    run.second()
    run.in_force(EMPTY, 0)
    assert said(run.second(), AdoptPlan) == []
    run.now_s += 10.0
    run.in_force(EMPTY, 0)
    run.second()  # the workers were silent as well, and settle first
    (adopt,) = said(run.second(), AdoptPlan)
    assert (adopt.plan.plan_id, adopt.based_on_epoch) == (plan.plan_id, 0)


def test_the_reason_tells_the_expected_load() -> None:
    """Otherwise the forecaster would be out of the loop, and nobody could ask what was known."""
    run = Run()
    run.in_force(EMPTY, 0)
    types = tuple(
        TypeForecast(
            request_type=i, arrivals_rps=rps, input_tokens_mean=1.0, output_tokens_mean=1.0
        )
        for i, rps in enumerate((1.5, 2.0))
    )
    run.step(ForecastReport(model_id="m", made_at_s=0.0, horizon_s=60.0, types=types))
    run.step(ForecastReport(model_id="unknown", made_at_s=0.0, horizon_s=60.0))
    effects = run.second()
    (adopt,) = said(effects, AdoptPlan)
    assert "3.5 requests/s expected" in adopt.plan.reason
    (log,) = [effect for effect in effects if isinstance(effect, Log)]
    assert log.fields["expected_rps"] == 3.5


def test_ends_without_a_word() -> None:
    """Otherwise shutdown could hang on a service that has nothing open."""
    assert Run().step(Draining()) == []


@pytest.mark.parametrize("field", ["plan_period_s", "worker_timeout_s", "start_wait_s"])
def test_settings_that_cannot_work_are_refused(field: str) -> None:
    """Otherwise a zero period would spin, or every worker count as gone."""
    with pytest.raises(ConfigInvalid, match=f"scheduler.{field}"):
        SchedulerConfig(**{field: 0.0}).checked()  # type: ignore[arg-type]
    with pytest.raises(ConfigInvalid, match="settle_s"):
        SchedulerConfig(settle_s=-1.0).checked()
