"""Scheduler core: decides which plan should be in force, and says why, or why not.

It owns no state that cannot be heard again: workers report, the switcher repeats the plan in
force, and a new scheduler reads both before it wishes for anything. A wish is repeated each
period until it is in force.

waiting   until the plan in force is known, and all workers of the topology have reported or
          ``start_wait_s`` has passed: deciding on half the workers would move replicas for nothing
deciding  whenever a decision is due (``agenda.py``), and at once when a worker says that it leaves

A slow policy solves outside the core, one problem at a time. Its answer counts only if the plan it
was computed against is still in force and all GPUs it names are still there.
"""

from collections.abc import Iterable
from typing import Any, assert_never

from services.scheduler.agenda import Agenda, Outlook
from services.scheduler.config import PolicyName, SchedulerConfig
from services.scheduler.demands import Demands
from services.scheduler.fleet import Fleet, engine_limits
from services.scheduler.policies.interface import Planned, Problem, StagedPolicy
from services.scheduler.policies.repair import repair
from services.scheduler.policies.verify import verify
from services.scheduler.solving import Solved, attempt
from services.scheduler.static_policy import Static
from services.scheduler.wish import Wish
from shared import subjects
from shared.core import Draining, Effect, Load, Loaded, Log, SetTimer, Start, Started
from shared.mesh import MeshConfig
from shared.messages.base import Message
from shared.messages.demand import DemandReport, ForecastReport
from shared.messages.plans import DeploymentPlan, PlanInForce, StoredPlan
from shared.messages.replicas import ReplicaReport, WorkerReport
from shared.subjects import Subject

KEY = "plan"
INPUTS = (
    subjects.WORKER_REPORT,
    subjects.PLAN_IN_FORCE,
    subjects.FORECAST_REPORT,
    subjects.DEMAND_REPORT,
    subjects.REPLICA_REPORT,
)
SILENCES_MAX = 5
"""Periods without word of the epoch we believe in, after which a lower one is believed: the
state bucket was emptied and epochs began anew."""


def inputs(policy: PolicyName) -> tuple[Subject[Any], ...]:
    """What the core has to hear under ``policy``: ten reports a second of each replica are for the
    reactive one alone."""
    reactive = (subjects.DEMAND_REPORT, subjects.REPLICA_REPORT)
    return tuple(s for s in INPUTS if policy == "dynamo" or s not in reactive)


class Tick(Message, frozen=True, kw_only=True):
    """Timer: a period has passed."""


class SolveDeadline(Message, frozen=True, kw_only=True):
    """Timer: the solve that started at ``started_s`` has had its time."""

    started_s: float


SchedulerEvent = (
    Started
    | Draining
    | WorkerReport
    | ReplicaReport
    | PlanInForce
    | ForecastReport
    | DemandReport
    | Loaded
    | Solved
    | SolveDeadline
    | Tick
)


class Scheduler:
    def __init__(
        self, config: SchedulerConfig, mesh: MeshConfig, policy: StagedPolicy | None = None
    ) -> None:
        """``policy``: as the registry makes it of ``config``; not needed for ``static``."""
        assert policy is not None or config.policy == "static", config.policy
        self._config, self._mesh = config, mesh
        self._policy: StagedPolicy = policy or Static()
        self._models = tuple(model.model_id for model in mesh.models)
        self._limits = engine_limits(mesh.engine)
        self._fleet = Fleet(config, mesh)
        self._demands = Demands(self._models)
        self._agenda = Agenda(self._policy.period_s)
        self._in_force: DeploymentPlan | None = None
        self._epoch = 0
        self._heard_s = 0.0  # when the switcher last confirmed ``_epoch``
        self._started_s = 0.0
        self._deciding = False
        self._wish = Wish()

    def step(  # noqa: C901  # one case per event
        self, event: SchedulerEvent, now_s: float
    ) -> list[Effect]:
        effects: Iterable[Effect] = ()
        match event:
            case Started():
                effects = self._on_started(now_s)
            case WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case ReplicaReport():
                self._demands.load(event, leaders=self._leaders())
            case PlanInForce():
                self._on_plan_in_force(event, now_s)
            case ForecastReport():
                self._demands.forecast(event)
            case DemandReport():
                self._demands.window(event)
            case Loaded():
                self._on_loaded(event, now_s)
            case Solved():
                effects = self._on_solved(event, now_s)
            case SolveDeadline():
                effects = self._on_deadline(event, now_s)
            case Tick():
                effects = self._on_tick(now_s)
            case Draining():
                pass  # nothing is open: the wish is repeated by whoever starts next
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        wish = self._wish.plan
        if wish is not None:
            assert self._in_force is not None
            assert wish.replicas, "never wish for an empty plan"
            gpus = [gpu for spec in wish.replicas for gpu in spec.gpus]
            assert len(gpus) == len(set(gpus)), gpus
            for row in wish.weights.values():
                assert abs(sum(row.values()) - 1.0) < 1e-9, row  # noqa: PLR2004  # rounding

    @property
    def wish(self) -> DeploymentPlan | None:
        """The plan asked for and not yet in force."""
        return self._wish.plan

    @property
    def content(self) -> bool:
        """Whether it has decided, and wishes for nothing but what is in force."""
        return self._deciding and self._wish.told and not self._agenda.solving

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._started_s = self._heard_s = now_s
        yield Load(KEY, StoredPlan)
        yield SetTimer(now_s + self._config.plan_period_s, Tick())

    def _on_worker_report(self, report: WorkerReport, now_s: float) -> Iterable[Effect]:
        leaves = self._fleet.hear(report, now_s)
        if leaves and self._deciding:
            yield from self._decide(now_s)

    def _on_plan_in_force(self, event: PlanInForce, now_s: float) -> None:
        silent_s = now_s - self._heard_s
        believed = event.epoch >= self._epoch or (
            silent_s > SILENCES_MAX * self._config.plan_period_s
        )
        if believed:
            self._epoch, self._in_force, self._heard_s = event.epoch, event.plan, now_s
            self._demands.keep_loads(self._leaders())
            self._wish.came_true(event.plan.plan_id)

    def _leaders(self) -> set[tuple[str, str]]:
        replicas = self._in_force.replicas if self._in_force else ()
        return {(spec.replica_id, spec.gpus[0]) for spec in replicas if spec.gpus}

    def _on_loaded(self, event: Loaded, now_s: float) -> None:
        stored = event.message
        if isinstance(stored, StoredPlan) and stored.epoch >= self._epoch:
            self._epoch, self._in_force, self._heard_s = stored.epoch, stored.in_force, now_s

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.plan_period_s, Tick())
        if not self._deciding and self._in_force is not None:
            waited_s = now_s - self._started_s
            self._deciding = self._fleet.complete or waited_s >= self._config.start_wait_s
            self._fleet.settle()
        if self._deciding:
            yield from self._decide(now_s)

    def _decide(self, now_s: float) -> Iterable[Effect]:
        """Decide if that is due, else repeat the wish. A wish against a plan that is in force no
        more would be refused: it is computed anew."""
        problem, agenda = self._problem(now_s), self._agenda
        outlook = Outlook(
            gpus=frozenset(offer.gpu_id for offer in problem.offers),
            forecasts=self._demands.heard,
            starting=self._config.policy != "static" and not self._demands.known,
        )
        orphaned = self._wish.orphaned(self._epoch)
        if agenda.solving or not (orphaned or agenda.due(now_s, outlook)):
            if not orphaned:
                yield from self._wish.repeat()
            return
        agenda.decided(now_s, outlook)
        if outlook.starting:
            yield from self._take(attempt(self._policy.start, problem), problem)
        elif self._policy.slow:
            agenda.solve_started(now_s)
            fields = {"epoch": self._epoch, "gpus": len(problem.offers)}
            yield Log("solve.started", fields, "debug")
            yield Start("solve", problem)
            yield SetTimer(now_s + self._config.solve_timeout_s, SolveDeadline(started_s=now_s))
        else:
            yield from self._take(attempt(self._policy.plan, problem), problem)

    def _problem(self, now_s: float) -> Problem:
        in_force = self._in_force
        assert in_force is not None
        in_use = {gpu for spec in in_force.replicas for gpu in spec.gpus}
        models = self._mesh.models
        targets = self._config.targets or {}
        return Problem(
            now_s=now_s,
            epoch=self._epoch,
            models=self._demands.models(),
            offers=self._fleet.offers(now_s, in_use=in_use),
            in_force=in_force,
            wishes=self._mesh.replicas,
            kinds=dict(self._fleet.kinds),
            profiles={model.model_id: model.profile_name for model in models},
            targets={m.model_id: targets.get(m.model_id, self._config.target) for m in models},
            limits=self._limits,
            time_limit_s=self._config.solve_timeout_s,
            observed=self._demands.windows,
            loads=self._demands.loads,
        )

    def _on_solved(self, event: Solved, now_s: float) -> Iterable[Effect]:
        agenda = self._agenda
        if not agenda.solving:
            return
        overdue = agenda.overdue
        agenda.solve_ended()
        fields = {"took_s": round(event.took_s, 3), "based_on_epoch": event.based_on_epoch}
        if overdue:
            yield Log("solve.dropped", {**fields, "why": "it took too long"}, "warning")
        elif event.based_on_epoch != self._epoch:
            why = f"epoch {self._epoch} is in force meanwhile"
            yield Log("solve.dropped", {**fields, "why": why}, "warning")
            agenda.again()
        else:
            yield Log("solve.ended", fields, "debug")
            yield from self._take(event, self._problem(now_s))

    def _on_deadline(self, event: SolveDeadline, now_s: float) -> Iterable[Effect]:
        if self._agenda.solving_since_s == event.started_s and not self._agenda.overdue:
            self._agenda.overdue = True
            limit_s = self._config.solve_timeout_s
            yield from self._fall_back(f"no answer within {limit_s:g} s", self._problem(now_s))

    def _take(self, solved: Solved, problem: Problem) -> Iterable[Effect]:
        if solved.planned is None:
            yield from self._fall_back(solved.failure, problem)
        else:
            yield from self._settle(solved.planned, problem)

    def _fall_back(self, failure: str, problem: Problem) -> Iterable[Effect]:
        """The policy failed: keep its last plan, on the GPUs that are left."""
        reason = f"policy {self._config.policy} failed: {failure}"
        yield Log("policy.failed", {"policy": self._config.policy, "reason": failure}, "error")
        yield from self._settle(repair(problem, why=reason), problem)

    def _settle(self, planned: Planned, problem: Problem) -> Iterable[Effect]:
        plan = planned.plan
        if plan is None:
            yield from self._keep(planned.reason)
            return
        wished = {wish.replica_id for wish in problem.wishes}
        wrong = verify(plan, problem.offers, self._models, across_nodes=wished)
        if wrong:
            yield Log("plan.dropped", {"plan_id": plan.plan_id, "wrong": wrong}, "warning")
            yield from self._keep(f"the plan computed cannot be: {'; '.join(wrong)}")
        elif plan.plan_id == problem.in_force.plan_id:
            gone = self._fleet.absent(offer.gpu_id for offer in problem.offers)
            absent = f"; workers absent: {', '.join(gone)}" if gone else ""
            yield from self._keep(f"the plan in force is as wished: {planned.reason}{absent}")
        else:
            yield from self._wish.ask(
                planned,
                epoch=self._epoch,
                workers=len(problem.offers),
                expected_rps=self._demands.expected_rps,
            )

    def _keep(self, why: str) -> Iterable[Effect]:
        return self._wish.keep(why, epoch=self._epoch, expected_rps=self._demands.expected_rps)
