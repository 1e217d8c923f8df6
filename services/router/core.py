"""Router core: which replica serves this request?

It holds, then answers. It knows the plan in force (stored, then republished each second), the
load of each replica (reported as it changes) and the request types (from the profiler). All
of it is soft: a router that starts holds its first questions for a moment until it has heard the
mesh, then answers from what it knows. Routers of one queue group never talk to each other.
"""

from collections import deque
from typing import assert_never

from services.router.config import RouterConfig
from services.router.loads import ReplicaLoad
from services.router.policies import POLICIES, Ask, Memory, Options
from services.router.request_types import TypeBook
from services.router.routes import Routes, load_key, options_of, routes_of, why_none
from shared import subjects
from shared.core import Draining, Effect, Load, Loaded, Log, Query, Reply, SetTimer, Started
from shared.messages.base import Message
from shared.messages.demand import DemandReport, ProfilerState
from shared.messages.plans import DeploymentPlan, PlanInForce, StoredPlan
from shared.messages.replicas import ReplicaReport
from shared.messages.requests import FailureCode, RequestsCompleted, RouteReply, RouteRequest

INPUTS = (
    subjects.PLAN_IN_FORCE,
    subjects.REPLICA_REPORT,
    subjects.DEMAND_REPORT,
    subjects.REQUESTS_COMPLETED,
)
QUERIES = ((subjects.ROUTE, "router"),)
PLAN_KEY, TYPES_KEY = "plan", "profiler"


class HoldDeadline(Message, frozen=True, kw_only=True):
    """Timer: answer now, whatever is known."""


RouterEvent = (
    Started
    | Loaded
    | HoldDeadline
    | Draining
    | Query
    | RouteRequest  # published without a reply address
    | PlanInForce
    | ReplicaReport
    | DemandReport
    | RequestsCompleted
)


class Router:
    def __init__(self, config: RouterConfig, *, models: tuple[str, ...], instance_id: str) -> None:
        """``models`` are those the topology serves: without a replica they are "no_replica" now,
        any other model without one is unknown."""
        self._config = config
        self._instance_id = instance_id
        self._served = frozenset(models)
        self._policy = POLICIES[config.policy]
        self._epoch = -1
        self._plan: DeploymentPlan | None = None
        self._plan_heard_s = float("-inf")
        self._loads: dict[tuple[str, str], ReplicaLoad] = {}
        self._planned: frozenset[tuple[str, str]] = frozenset()
        self._routes: dict[str, Routes] = {}
        self._types = TypeBook(tenants_max=config.tenants_max, spread_ln=config.length_spread_ln)
        self._holding = True
        self._parked: deque[Query] = deque()
        self._failing: FailureCode | None = None

    def step(  # noqa: C901, PLR0911  # one case per event
        self, event: RouterEvent, now_s: float
    ) -> list[Effect]:
        match event:
            case Query():
                return self._on_query(event, now_s)
            case ReplicaReport():
                return self._on_report(event, now_s)
            case PlanInForce():
                return self._on_plan(event.epoch, event.plan, now_s)
            case RequestsCompleted():
                for done in event.completed:
                    self._types.learn_completed(done)
                return []
            case DemandReport():
                return self._on_demand(event)
            case Started():
                return [
                    Load(PLAN_KEY, StoredPlan),
                    Load(TYPES_KEY, ProfilerState),
                    SetTimer(now_s + self._config.start_hold_s, HoldDeadline()),
                ]
            case Loaded():
                return self._on_loaded(event, now_s)
            case HoldDeadline() | Draining():
                return self._release(now_s)
            case RouteRequest():
                fields = {"request_id": event.request_id}
                return [Log("router.question_without_reply_address", fields, "warning")]
            case _:
                assert_never(event)

    def check(self) -> None:
        config = self._config
        assert len(self._loads) <= max(config.replicas_max, len(self._planned)), len(self._loads)
        assert self._types.tenants <= config.tenants_max, self._types.tenants
        assert len(self._parked) <= config.parked_max, len(self._parked)
        assert self._holding or not self._parked, "questions parked after the hold"
        assert self._planned <= self._loads.keys(), "a planned replica without a load"
        for routes in self._routes.values():
            routes.check()
            for candidate in routes.candidates:
                assert candidate.load.decisions <= config.decisions_max, candidate.replica_id

    # What the router learns

    def _on_loaded(self, event: Loaded, now_s: float) -> list[Effect]:
        match event.message:
            case StoredPlan() as stored:
                return self._on_plan(stored.epoch, stored.in_force, now_s)
            case ProfilerState() as state:
                for model in state.models:
                    if self._knows(model.model_id):
                        self._types.restore(model)
            case _:
                pass  # nothing stored yet: the first plan or report will tell
        return []

    def _on_plan(self, epoch: int, plan: DeploymentPlan, now_s: float) -> list[Effect]:
        """Follow the plan with the highest epoch. A lower one is late, unless ours has not been
        heard for long: then the state bucket was emptied and epochs started again."""
        silent_s = now_s - self._plan_heard_s
        if epoch < self._epoch and silent_s <= self._config.epoch_reset_s:
            return []
        effects: list[Effect] = []
        self._plan_heard_s = now_s
        if self._plan is None or (epoch, plan.plan_id) != (self._epoch, self._plan.plan_id):
            fields = {"epoch": epoch, "plan_id": plan.plan_id, "replicas": len(plan.replicas)}
            level = "warning" if epoch < self._epoch else "info"
            effects.append(Log("router.plan_followed", fields, level))
            self._follow(epoch, plan)
        return effects + self._release_if_known(now_s)

    def _follow(self, epoch: int, plan: DeploymentPlan) -> None:
        self._epoch, self._plan = epoch, plan
        self._planned = frozenset(load_key(spec) for spec in plan.replicas if spec.gpus)
        for key in self._planned:
            if key not in self._loads:
                self._loads[key] = ReplicaLoad(decisions_max=self._config.decisions_max)
        self._bound_loads()
        former = self._routes
        self._routes = {
            model_id: routes_of(
                plan,
                model_id,
                self._loads,
                former[model_id].memory if model_id in former else self._new_memory(),
            )
            for model_id in {spec.model_id for spec in plan.replicas}
        }

    def _new_memory(self) -> Memory:
        return Memory(
            instance_id=self._instance_id,
            load_gain=self._config.load_gain,
            prefix_load_slack=self._config.prefix_load_slack,
            prefixes_max=self._config.prefixes_max,
        )

    def _on_report(self, report: ReplicaReport, now_s: float) -> list[Effect]:
        key = (report.replica_id, report.worker_id)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = ReplicaLoad(decisions_max=self._config.decisions_max)
            self._bound_loads()
        load.update(
            report,
            now_s=now_s,
            decision_lag_s=self._config.decision_lag_s,
            decision_settle_s=self._config.decision_settle_s,
        )
        return self._release_if_known(now_s)

    def _bound_loads(self) -> None:
        """Forget the longest silent replicas outside the plan, beyond the bound."""
        excess = len(self._loads) - max(self._config.replicas_max, len(self._planned))
        if excess > 0:
            others = [key for key in self._loads if key not in self._planned]
            others.sort(key=lambda key: self._loads[key].reported_s)
            for key in others[:excess]:
                del self._loads[key]

    def _on_demand(self, report: DemandReport) -> list[Effect]:
        if self._knows(report.model_id):
            self._types.learn(report)
        return []

    def _knows(self, model_id: str) -> bool:
        return model_id in self._served or model_id in self._routes

    # What the router answers

    def _on_query(self, query: Query, now_s: float) -> list[Effect]:
        if not isinstance(query.message, RouteRequest):
            fields = {"message_type": type(query.message).__name__}
            return [Log("router.question_unknown", fields, "warning")]
        if self._holding and len(self._parked) < self._config.parked_max:
            self._parked.append(query)
            return []
        reply = self._route(query.message, now_s)
        if reply.failure == self._failing:
            return [Reply(query.reply_to, reply)]
        self._failing = reply.failure  # logged once per change, not once per request
        fields = {"failure": reply.failure, "reason": reply.reason, "epoch": self._epoch}
        level = "info" if reply.failure is None else "warning"
        return [Reply(query.reply_to, reply), Log("router.answers_changed", fields, level)]

    def _release_if_known(self, now_s: float) -> list[Effect]:
        """End the hold as soon as every replica of the plan has been heard: an earlier end would
        send everything parked to the first that was."""
        if not self._holding or self._plan is None:
            return []
        if any(self._loads[key].report is None for key in self._planned):
            return []
        return self._release(now_s)

    def _release(self, now_s: float) -> list[Effect]:
        self._holding = False
        parked, self._parked = self._parked, deque()
        return [effect for query in parked for effect in self._on_query(query, now_s)]

    def _route(self, request: RouteRequest, now_s: float) -> RouteReply:
        routes = self._routes.get(request.model_id)
        if routes is None:
            return self._without_routes(request)
        numbers, chances = self._types.chances(request)
        request_type = numbers[chances.index(max(chances))] if chances else -1
        shares = routes.shares(numbers, chances)
        options, note = self._options(routes, shares, request.excluded, now_s), ""
        if not options.candidates and request.excluded:
            options, note = self._options(routes, shares, (), now_s), ", excluded but alone"
        if not options.candidates:
            return self._without_options(request, routes, now_s)
        ask = Ask(request_type, request.prefix_hashes, request.input_tokens)
        chosen = options.candidates[self._policy(options, ask, routes.memory)]
        load = chosen.load
        reason = (
            f"{self._config.policy}: type {request_type}, weight {shares[chosen.index]:.2f}, "
            f"load {load.in_flight}/{load.slots}, {len(options.candidates)} candidates{note}"
        )
        load.decide(request.request_id, now_s)
        return RouteReply(
            request_id=request.request_id,
            attempt=request.attempt,
            replica_id=chosen.replica_id,
            leader_id=chosen.leader_id,
            epoch=self._epoch,
            request_type=request_type,
            reason=reason,
        )

    def _options(
        self, routes: Routes, shares: list[float], excluded: tuple[str, ...], now_s: float
    ) -> Options:
        return options_of(
            routes,
            shares,
            excluded=excluded,
            now_s=now_s,
            stale_s=self._config.report_stale_s,
            dead_s=self._config.report_dead_s,
        )

    def _without_routes(self, request: RouteRequest) -> RouteReply:
        if self._plan is None:
            reason = "no plan heard yet: is the switcher running?"
        elif request.model_id in self._served:
            reason = f"the plan of epoch {self._epoch} has no replica of {request.model_id}"
        else:
            return _failed(request, "unknown_model", f"no model {request.model_id} here", 0.0)
        return _failed(request, "no_replica", reason, self._config.no_replica_retry_s)

    def _without_options(self, request: RouteRequest, routes: Routes, now_s: float) -> RouteReply:
        full, reason = why_none(routes, now_s=now_s, dead_s=self._config.report_dead_s)
        if full:
            return _failed(request, "overloaded", reason, self._config.overloaded_retry_s)
        return _failed(request, "no_replica", reason, self._config.no_replica_retry_s)


def _failed(
    request: RouteRequest, failure: FailureCode, reason: str, retry_after_s: float
) -> RouteReply:
    return RouteReply(
        request_id=request.request_id,
        attempt=request.attempt,
        reason=reason,
        failure=failure,
        retry_after_s=retry_after_s,
    )
