"""Scheduler core: decides which plan should be in force, and says why, or why not.

It owns no state that cannot be heard again: workers report, the switcher repeats the plan in
force, and a new scheduler reads both before it wishes for anything. A wish is repeated each
period until it is in force.

waiting   until the plan in force is known, and all workers of the topology have reported or
          ``start_wait_s`` has passed: deciding on half the workers would move replicas for nothing
deciding  whenever a decision is due (``agenda.py``); between decisions, each period, routing
          weights are corrected (``balance.py``)
pinned    a person asked for the plan (``pins.py``): policies are not asked until it is released

A slow policy solves outside the core, one problem at a time. Its answer counts only if the
replicas it was computed against are still in force, whatever their weights, and all GPUs it names
are still there. When the plan in force loses a GPU, which is known at once from a worker that
leaves or a replica that failed, else after ``worker_timeout_s`` and within a period, the replicas
that are left are asked for in that same step, and nothing waits for a solve.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from services.scheduler.agenda import Agenda, Outlook
from services.scheduler.asking import Asking
from services.scheduler.balance import Balance
from services.scheduler.config import SchedulerConfig
from services.scheduler.demands import Demands
from services.scheduler.events import (
    CORRECTING,
    INPUTS,
    KEY,
    QUERIES,
    SchedulerEvent,
    SolveDeadline,
    Tick,
    inputs,
)
from services.scheduler.fleet import Fleet
from services.scheduler.framing import Framing
from services.scheduler.pins import Pins
from services.scheduler.policies.interface import Problem, StagedPolicy
from services.scheduler.policies.repair import lost, repair, survivors
from services.scheduler.solving import Solved, attempt, timed
from services.scheduler.standing import Standing
from services.scheduler.static_policy import Static
from services.scheduler.wish import Wish
from shared.core import Draining, Effect, Load, Loaded, Log, Query, SetTimer, Start, Started
from shared.mesh import MeshConfig
from shared.messages.demand import DemandReport, ForecastReport
from shared.messages.plans import DeploymentPlan, PinPlan, PlanInForce, ReleasePlan, StoredPlan
from shared.messages.replicas import ReplicaFailed, ReplicaReport, WorkerReport

__all__ = ["INPUTS", "QUERIES", "Scheduler", "SolveDeadline", "Tick", "inputs"]


class Scheduler:
    def __init__(
        self, config: SchedulerConfig, mesh: MeshConfig, policy: StagedPolicy | None = None
    ) -> None:
        """``policy``: as the registry makes it of ``config``; not needed for ``static``."""
        assert policy is not None or config.policy == "static", config.policy
        self._config = config
        self._policy: StagedPolicy = policy or Static()
        self._forecasts_count = config.policy != "static"
        self._corrects = config.policy == CORRECTING
        self._framing = Framing(config, mesh)
        self._fleet = Fleet(config, mesh)
        stale_s, floored = config.forecast_stale_s, self._corrects
        self._demands = Demands(mesh.model_ids, stale_s=stale_s, floored=floored)
        self._agenda = Agenda(self._policy.period_s)
        self._standing = Standing(period_s=config.plan_period_s)
        self._balance = Balance(config.correction_period_s if self._corrects else 0.0)
        self._wish = Wish(keep_period_s=config.keep_period_s)
        self._asking = Asking(
            config=config,
            mesh=mesh,
            fleet=self._fleet,
            demands=self._demands,
            standing=self._standing,
            balance=self._balance,
            wish=self._wish,
        )
        self._pins = Pins(self._asking)
        self._before_loss: DeploymentPlan | None = None  # since when no policy has answered
        self._started_s = 0.0
        self._deciding = False

    def step(  # noqa: C901, PLR0912  # one case per event
        self, event: SchedulerEvent, now_s: float
    ) -> list[Effect]:
        effects: Iterable[Effect] = ()
        match event:
            case Started():
                effects = self._on_started(now_s)
            case WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case ReplicaReport():
                self._demands.load(event, leaders=self._standing.leaders)
            case ReplicaFailed():
                effects = self._on_replica_failed(event, now_s)
            case PlanInForce():
                self._on_plan_in_force(event, now_s)
            case ForecastReport():
                self._demands.forecast(event, now_s)
            case DemandReport():
                self._demands.window(event, now_s, served=self._standing.models)
            case Loaded():
                self._on_loaded(event, now_s)
            case Solved():
                effects = self._on_solved(event, now_s)
            case SolveDeadline():
                effects = self._on_deadline(event, now_s)
            case Tick():
                effects = self._on_tick(now_s)
            case Query():
                effects = self._on_query(event, now_s)
            case PinPlan() | ReleasePlan():
                fields = {"message_type": type(event).__name__}
                effects = [Log("scheduler.question_without_reply_address", fields, "warning")]
            case Draining():
                pass  # nothing is open: the wish is repeated by whoever starts next
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        assert self._wish.plan is None or self._standing.plan is not None
        self._wish.check()

    @property
    def wish(self) -> DeploymentPlan | None:
        """The plan asked for and not yet in force."""
        return self._wish.plan

    @property
    def content(self) -> bool:
        """Whether it has decided, and wishes for nothing but what is in force."""
        return self._deciding and self._wish.told and not self._agenda.solving

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._started_s = now_s
        self._standing.begin(now_s)
        yield Load(KEY, StoredPlan)
        yield SetTimer(now_s + self._config.plan_period_s, Tick())

    def _on_worker_report(self, report: WorkerReport, now_s: float) -> Iterable[Effect]:
        leaves = self._fleet.hear(report, now_s)
        if leaves and self._deciding:
            yield from self._decide(now_s)

    def _on_replica_failed(self, event: ReplicaFailed, now_s: float) -> Iterable[Effect]:
        """A replica that comes into force breaks on its own account; one in force takes its GPU
        along. What a person pinned stays where it is, for the switcher to start again."""
        in_force = (event.replica_id, event.worker_id) in {
            (spec.replica_id, gpu) for spec in self._standing.replicas for gpu in spec.gpus
        }
        if event.refused or not in_force or not self._corrects or self._pins.plan is not None:
            return
        if self._fleet.failed(event.worker_id, now_s):
            fields = {"replica_id": event.replica_id, "worker_id": event.worker_id}
            yield Log("gpu.distrusted", {**fields, "detail": event.detail}, "warning")
            if self._deciding:
                yield from self._decide(now_s)

    def _on_plan_in_force(self, event: PlanInForce, now_s: float) -> None:
        if self._standing.hear(event, now_s):
            self._demands.keep_loads(self._standing.leaders)
            self._wish.came_true(event.plan.plan_id)
            self._agenda.stands(self._standing.replicas)

    def _on_loaded(self, event: Loaded, now_s: float) -> None:
        if isinstance(event.message, StoredPlan):
            self._standing.recover(event.message, now_s)

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.plan_period_s, Tick())
        if not self._deciding and self._standing.plan is not None:
            waited_s = now_s - self._started_s
            self._deciding = self._fleet.complete or waited_s >= self._config.start_wait_s
            self._fleet.settle()
        if self._deciding:
            if self._forecasts_count:
                yield from self._demands.news(now_s)
            yield from self._decide(now_s)
            if self._pins.plan is None:
                yield from self._asking.correct(now_s, lambda: self._problem(now_s))
            else:
                self._balance.rest()

    def _decide(self, now_s: float) -> Iterable[Effect]:
        """Decide if that is due, else repeat the wish. One that was computed against replicas in
        force no more is computed anew."""
        problem, agenda = self._problem(now_s), self._agenda
        if self._pins.plan is not None:
            yield from self._pins.keep_to(self._pins.plan, problem)
            return
        outlook = self._outlook(problem)
        blind = self._forecasts_count and self._demands.blind(now_s)
        if self._policy.slow and not outlook.starting and not blind:
            problem, effects = self._without_lost(problem)
            yield from effects
        orphaned = self._wish.orphaned(self._standing.plan)
        if agenda.solving or not (orphaned or agenda.due(now_s, outlook)):
            if not orphaned:
                yield from self._wish.repeat(self._standing.epoch)
            return
        agenda.decided(now_s, outlook)
        if outlook.starting:
            yield from self._take(attempt(self._policy.start, problem), problem)
        elif blind:
            yield from self._asking.settle(repair(problem, why="no word of demand"), problem)
        elif self._policy.slow:
            agenda.solve_started(now_s, problem.in_force.replicas)
            fields = {"epoch": self._standing.epoch, "gpus": len(problem.offers)}
            yield Log("solve.started", fields, "debug")
            yield Start("solve", problem)
            yield SetTimer(now_s + self._config.solve_timeout_s, SolveDeadline(started_s=now_s))
        else:
            yield from self._take(attempt(self._policy.plan, problem), problem)

    def _outlook(self, problem: Problem) -> Outlook:
        watch_s = self._config.watch_s if self._corrects and not self._standing.inherited else 0.0
        return Outlook(
            gpus=frozenset(offer.gpu_id for offer in problem.offers),
            forecasts=self._demands.heard,
            starting=self._forecasts_count
            and not self._demands.watched(problem.now_s, for_s=watch_s),
            wanted=self._demands.wanted(problem.now_s),
        )

    def _without_lost(self, problem: Problem) -> tuple[Problem, list[Effect]]:
        """If GPUs of the plan in force are gone, the replicas that are left: asked for at once,
        unless something better is, and what the policy is to go out from."""
        if not lost(problem.in_force, problem):
            return problem, []
        left, wish = survivors(problem, why="GPUs lost"), self._wish.plan
        effects: list[Effect] = []
        if left.plan is None:
            if wish is not None and lost(wish, problem):
                effects = list(self._asking.keep(left.reason, problem.now_s))
            return problem, effects
        if wish is None or self._wish.orphaned(self._standing.plan) or lost(wish, problem):
            self._before_loss = self._before_loss or problem.in_force
            effects = list(self._asking.settle(left, problem))
        return replace(problem, in_force=left.plan), effects

    def _problem(self, now_s: float) -> Problem:
        return self._framing.problem(self._fleet, self._demands, self._standing, now_s)

    def _on_solved(self, event: Solved, now_s: float) -> Iterable[Effect]:
        agenda = self._agenda
        if not agenda.solving:
            return
        late = "it took too long" if agenda.overdue else ""
        why = "a plan was pinned meanwhile" if self._pins.plan is not None else late
        agenda.solve_ended()
        fields = {"took_s": round(event.took_s, 3), "based_on_epoch": event.based_on_epoch}
        if why:
            yield Log("solve.dropped", {**fields, "why": why}, "warning")
            return
        problem, effects = self._without_lost(self._problem(now_s))
        yield from effects
        if agenda.solving_for in (self._standing.replicas, problem.in_force.replicas):
            yield Log("solve.ended", fields, "debug")
            yield from self._take(event, problem)
        else:
            why = f"other replicas are in force meanwhile, of epoch {self._standing.epoch}"
            yield Log("solve.dropped", {**fields, "why": why}, "warning")
            agenda.again()

    def _on_deadline(self, event: SolveDeadline, now_s: float) -> Iterable[Effect]:
        if self._agenda.solving_since_s == event.started_s and not self._agenda.overdue:
            self._agenda.overdue = True
            if self._pins.plan is None:
                limit_s = self._config.solve_timeout_s
                problem = self._problem(now_s)
                yield from self._fall_back(f"no answer within {limit_s:g} s", problem)

    def _take(self, solved: Solved, problem: Problem) -> Iterable[Effect]:
        if (planned := timed(solved)) is None:
            yield from self._fall_back(solved.failure, problem)
        else:
            self._before_loss = None
            self._agenda.leads_to(planned)
            yield from self._asking.settle_answer(planned, problem)

    def _fall_back(self, failure: str, problem: Problem) -> Iterable[Effect]:
        """The policy failed: keep its last plan, on the GPUs that are left."""
        problem = replace(problem, in_force=self._before_loss or problem.in_force)
        reason = f"policy {self._config.policy} failed: {failure}"
        yield Log("policy.failed", {"policy": self._config.policy, "reason": failure}, "error")
        yield from self._asking.settle(repair(problem, why=reason), problem)

    def _on_query(self, query: Query, now_s: float) -> Iterable[Effect]:
        before = self._pins.plan
        problem = self._problem(now_s) if self._deciding else None
        yield from self._pins.answer(query, problem)
        if before is not None and self._pins.plan is None:
            self._agenda.again()
