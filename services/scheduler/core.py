"""Scheduler core: decides which plan should be in force, and says why, or why not.

It owns no state that cannot be heard again: workers report, the switcher repeats the plan in
force, and a new scheduler reads both before it wishes for anything. A wish is repeated each
period until it is in force, computed anew each time against the plan in force of that moment.

waiting   until the plan in force is known, and all workers of the topology have reported or
          ``start_wait_s`` has passed: deciding on half the workers would move replicas for nothing
deciding  each period, and at once when a worker says that it leaves
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from services.scheduler.config import SchedulerConfig
from services.scheduler.static_policy import GpuOffer, Planned, plan_static
from shared import subjects
from shared.core import Draining, Effect, Load, Loaded, Log, SetTimer, Started
from shared.mesh import MeshConfig
from shared.messages.base import Message
from shared.messages.demand import ForecastReport
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PlanInForce,
    PlanKept,
    PlanProposed,
    StoredPlan,
)
from shared.messages.replicas import WorkerReport

KEY = "plan"
INPUTS = (subjects.WORKER_REPORT, subjects.PLAN_IN_FORCE, subjects.FORECAST_REPORT)
SILENCES_MAX = 5
"""Periods without word of the epoch we believe in, after which a lower one is believed: the
state bucket was emptied and epochs began anew."""


class Tick(Message, frozen=True, kw_only=True):
    """Timer: a period has passed."""


SchedulerEvent = Started | Draining | WorkerReport | PlanInForce | ForecastReport | Loaded | Tick


@dataclass(slots=True)
class _Worker:
    report: WorkerReport
    seen_s: float
    appeared_s: float


class Scheduler:
    def __init__(self, config: SchedulerConfig, mesh: MeshConfig) -> None:
        self._config, self._mesh = config, mesh
        self._expected = {gpu.gpu_id for gpu in mesh.gpus()}
        self._kinds = {gpu.gpu_id: gpu.kind for gpu in mesh.gpus()}
        self._workers: dict[str, _Worker] = {}
        self._in_force: DeploymentPlan | None = None
        self._epoch = 0
        self._heard_s = 0.0  # when the switcher last confirmed ``_epoch``
        self._forecast: ForecastReport | None = None
        self._started_s = 0.0
        self._deciding = False
        self._wish: DeploymentPlan | None = None  # last proposed and not yet in force
        self._said = ""  # last decision told, without its numbers

    def step(self, event: SchedulerEvent, now_s: float) -> list[Effect]:
        match event:
            case Started():
                effects = self._on_started(now_s)
            case WorkerReport():
                effects = self._on_worker_report(event, now_s)
            case PlanInForce():
                effects = self._on_plan_in_force(event, now_s)
            case ForecastReport():
                effects = self._on_forecast_report(event)
            case Loaded():
                effects = self._on_loaded(event, now_s)
            case Tick():
                effects = self._on_tick(now_s)
            case Draining():
                effects = ()  # nothing is open: the wish is repeated by whoever starts next
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        if self._wish is not None:
            assert self._in_force is not None
            assert self._wish.replicas, "never wish for an empty plan"
            gpus = [gpu for spec in self._wish.replicas for gpu in spec.gpus]
            assert len(gpus) == len(set(gpus)), gpus
            for row in self._wish.weights.values():
                assert abs(sum(row.values()) - 1.0) < 1e-9, row  # noqa: PLR2004  # rounding

    @property
    def wish(self) -> DeploymentPlan | None:
        """The plan asked for and not yet in force."""
        return self._wish

    @property
    def content(self) -> bool:
        """Whether it has decided, and wishes for nothing but what is in force."""
        return self._deciding and self._wish is None and bool(self._said)

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._started_s = self._heard_s = now_s
        yield Load(KEY, StoredPlan)
        yield SetTimer(now_s + self._config.plan_period_s, Tick())

    def _on_worker_report(self, report: WorkerReport, now_s: float) -> Iterable[Effect]:
        worker = self._workers.get(report.worker_id)
        if worker is None or self._gone(worker, now_s):
            self._workers[report.worker_id] = _Worker(report, now_s, now_s)
        else:
            was_leaving, worker.report, worker.seen_s = worker.report.leaving, report, now_s
            if was_leaving and not report.leaving:
                worker.appeared_s = now_s
            if report.leaving and not was_leaving and self._deciding:
                yield from self._decide(now_s)

    def _on_plan_in_force(self, event: PlanInForce, now_s: float) -> Iterable[Effect]:
        silent_s = now_s - self._heard_s
        believed = event.epoch >= self._epoch or (
            silent_s > SILENCES_MAX * self._config.plan_period_s
        )
        if believed:
            self._epoch, self._in_force, self._heard_s = event.epoch, event.plan, now_s
            if self._wish is not None and self._wish.plan_id == event.plan.plan_id:
                self._wish = None
        return ()

    def _on_forecast_report(self, event: ForecastReport) -> Iterable[Effect]:
        if event.model_id == self._mesh.model.model_id:
            self._forecast = event
        return ()

    def _on_loaded(self, event: Loaded, now_s: float) -> Iterable[Effect]:
        stored = event.message
        if isinstance(stored, StoredPlan) and stored.epoch >= self._epoch:
            self._epoch, self._in_force, self._heard_s = stored.epoch, stored.in_force, now_s
        return ()

    def _on_tick(self, now_s: float) -> Iterable[Effect]:
        yield SetTimer(now_s + self._config.plan_period_s, Tick())
        if not self._deciding and self._in_force is not None:
            complete = self._expected <= self._workers.keys()
            self._deciding = complete or now_s - self._started_s >= self._config.start_wait_s
            for worker in self._workers.values():
                worker.appeared_s = float("-inf")  # the wait at the start has settled them
        if self._deciding:
            yield from self._decide(now_s)

    def _decide(self, now_s: float) -> Iterable[Effect]:
        in_force = self._in_force
        assert in_force is not None
        offers, gone = self._offers(now_s)
        planned = plan_static(
            self._mesh.replicas,
            self._mesh.model.model_id,
            offers=offers,
            kinds=self._kinds,
            in_force=in_force,
        )
        plan = planned.plan
        if plan is None:
            yield from self._keep(f"nothing can be placed, so nothing moves: {planned.reason}")
            return
        if plan.plan_id == in_force.plan_id:
            absent = f"; workers absent: {', '.join(gone)}" if gone else ""
            yield from self._keep(f"the plan in force is as wished: {planned.reason}{absent}")
            return
        yield from self._propose(plan, planned, workers=len(offers))

    def _propose(self, plan: DeploymentPlan, planned: Planned, *, workers: int) -> Iterable[Effect]:
        news = self._wish is None or self._wish.plan_id != plan.plan_id
        if news or self._wish is None:
            reason = f"{planned.reason}; {self._expected_load()}"
            self._wish = DeploymentPlan(
                plan_id=plan.plan_id, replicas=plan.replicas, weights=plan.weights, reason=reason
            )
            self._said = ""
            yield Log(
                "plan.proposed",
                {
                    "plan_id": plan.plan_id,
                    "based_on_epoch": self._epoch,
                    "replicas": len(plan.replicas),
                    "dropped": planned.dropped,
                    "workers": workers,
                    "expected_rps": self._expected_rps(),
                    "reason": reason,
                },
            )
            yield subjects.PLAN_PROPOSED.send(
                PlanProposed(plan=self._wish, based_on_epoch=self._epoch, reason=reason)
            )
        yield subjects.ADOPT_PLAN.send(AdoptPlan(plan=self._wish, based_on_epoch=self._epoch))

    def _keep(self, why: str) -> Iterable[Effect]:
        self._wish = None
        if why == self._said:
            return
        self._said = why
        reason = f"{why}; {self._expected_load()}"
        yield Log(
            "plan.kept",
            {"epoch": self._epoch, "expected_rps": self._expected_rps(), "reason": reason},
        )
        yield subjects.PLAN_KEPT.send(PlanKept(epoch=self._epoch, reason=reason))

    def _offers(self, now_s: float) -> tuple[list[GpuOffer], list[str]]:
        """GPUs that may be planned onto, and the topology's workers that are absent."""
        assert self._in_force is not None
        in_use = {gpu for spec in self._in_force.replicas for gpu in spec.gpus}
        offers: list[GpuOffer] = []
        for worker_id, worker in sorted(self._workers.items()):
            report = worker.report
            if self._gone(worker, now_s):
                if worker_id not in self._expected:
                    del self._workers[worker_id]  # of no topology we know: forget it
                continue
            settled = now_s - worker.appeared_s >= self._config.settle_s
            serves = self._mesh.model.model_id in report.models
            if not report.leaving and serves and (settled or worker_id in in_use):
                self._kinds[worker_id] = report.gpu.kind
                offers.append(
                    GpuOffer(gpu_id=worker_id, node_id=report.node_id, kind=report.gpu.kind)
                )
        offered = {offer.gpu_id for offer in offers}
        return offers, sorted(self._expected - offered)

    def _gone(self, worker: _Worker, now_s: float) -> bool:
        return now_s - worker.seen_s > self._config.worker_timeout_s

    def _expected_rps(self) -> float | None:
        """Arrivals that the newest forecast expects; None while there is none."""
        if self._forecast is None:
            return None
        return round(sum(kind.arrivals_rps for kind in self._forecast.types), 3)

    def _expected_load(self) -> str:
        rps = self._expected_rps()
        return "no forecast yet" if rps is None else f"{rps:g} requests/s expected"
