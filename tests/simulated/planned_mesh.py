"""The simulated mesh with a policy that plans for forecasts and takes its time, the fast loop that
corrects its weights, and a person who pins plans and releases them.

Demand changes every few seconds, flaps, vanishes and comes back; the policy follows it at once,
raises now and then and may take longer than it is given. Forecasts are lost, late and repeated as
the weather has it, and whoever makes them crashes and falls silent.
"""

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from loadgen.simulator.mesh import Mesh
from loadgen.simulator.mesh_services import MODEL, SCHEDULER
from loadgen.simulator.process import Job, NodeSpec, Port
from loadgen.simulator.workshop import NO_FAULTS
from services.scheduler import core as scheduler
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.placing import place
from services.scheduler.policies.weights import joined, planned
from services.scheduler.solving import solve
from services.scheduler.static_policy import Static
from services.switcher.core import KEY
from shared import subjects
from shared.core import Ask, Core, Effect, SetTimer, Started
from shared.hardware import Parallelism
from shared.messages.base import Message
from shared.messages.demand import DemandReport, ForecastReport, TypeDemand, TypeForecast
from shared.messages.plans import (
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    ReleasePlan,
    ReplicaSpec,
    StoredPlan,
)
from shared.subjects import Subject

ANSWERS = Subject("person.answers", PinAnswer)
ONE = Parallelism()
CONFIG = msgspec.structs.replace(
    SCHEDULER,
    policy="oserve",
    policy_period_s=2.0,
    solve_timeout_s=3.0,
    forecast_stale_s=4.0,
    correction_period_s=1.0,
    keep_period_s=5.0,
    watch_s=0.0,
)


class Beat(Message, frozen=True, kw_only=True):
    """Timer: speak."""


class Follows:
    """A replica of one GPU for each request per second, whatever was before."""

    slow = True
    period_s = 2.0

    def __init__(self, rng: random.Random, calm: Mapping[str, bool]) -> None:
        self._rng, self._calm = rng, calm

    def start(self, problem: Problem) -> Planned:
        return Static().plan(problem)

    def plan(self, problem: Problem) -> Planned:
        if not self._calm["calm"] and self._rng.random() < 0.1:
            raise ArithmeticError("as drawn")
        (demand,) = problem.models
        placed = place(
            {(demand.model_id, ONE): wanted(demand.arrivals_rps)}, problem.offers, problem.in_force
        )
        ids = [spec.replica_id for spec in placed.replicas]
        rows = {str(k.request_type): dict.fromkeys(ids[k.request_type :] or ids, 1.0)
                for k in demand.types}  # fmt: skip
        weights = joined({demand.model_id: {"*": dict.fromkeys(ids, 1.0), **rows}}) if ids else {}
        return planned(placed.replicas, weights, reason="as expected")


def wanted(rps: float) -> int:
    return max(1, math.ceil(rps - 1e-9))


class Forecasts:
    """Profiler and forecaster in one: what arrives, each second. A silent one says nothing."""

    def __init__(self, rng: random.Random, calm: Mapping[str, bool], last: float) -> None:
        self._rng, self._calm, self._last = rng, calm, last

    def step(self, event: Started | Beat, now_s: float) -> list[Effect]:
        del event
        effects: list[Effect] = [SetTimer(now_s + 1.0, Beat())]
        if self._calm["calm"]:
            rates: list[float] = [self._last]
        else:
            count = self._rng.choice([0, 1, 1, 2])
            rates = [self._rng.uniform(0.2, 3.0) for _ in range(count)]
        seen = self._calm["calm"] or self._rng.random() < 0.8
        foreseen = self._calm["calm"] or self._rng.random() < 0.6
        if seen:
            effects.append(subjects.DEMAND_REPORT.send(_window(rates, now_s)))
        if foreseen:
            effects.append(subjects.FORECAST_REPORT.send(_forecast(rates, now_s)))
        return effects

    def check(self) -> None:
        """It holds nothing."""


def _window(rates: Iterable[float], now_s: float) -> DemandReport:
    types = tuple(
        TypeDemand(
            request_type=number, requests=1, arrivals_rps=rps, input_tokens_mean=3.0,
            output_tokens_mean=9.0, input_tokens_centroid=3.0, output_tokens_centroid=9.0,
        )
        for number, rps in enumerate(rates)
    )  # fmt: skip
    return DemandReport(
        model_id=MODEL.model_id, window_start_s=now_s - 1.0, window_s=1.0, types=types
    )


def _forecast(rates: Iterable[float], now_s: float) -> ForecastReport:
    types = tuple(
        TypeForecast(
            request_type=number, arrivals_rps=rps, input_tokens_mean=3.0, output_tokens_mean=9.0
        )
        for number, rps in enumerate(rates)
    )
    return ForecastReport(
        model_id=MODEL.model_id, made_at_s=now_s, horizon_s=3.0, types=types
    )  # fmt: skip


class Person:
    """Pins what comes to their mind, and asks again until they are answered. In most runs they
    release it in the end, and say so again and again, since an older wish may come late."""

    def __init__(self, rng: random.Random, gpus: list[str]) -> None:
        self._rng, self._gpus = rng, gpus
        self.asked: list[PinPlan | ReleasePlan] = []
        self._open: PinPlan | ReleasePlan | None = None
        self._at_s = sorted(rng.uniform(1.0, 16.0) for _ in range(rng.choice([0, 0, 1, 2])))
        self._release_s = 17.0 if rng.random() < 0.7 else math.inf
        self.refused = 0

    @property
    def released_last(self) -> bool:
        """Whether nothing they pinned is to stay."""
        return not self.asked or isinstance(self.asked[-1], ReleasePlan)

    def step(self, event: Started | Beat | PinAnswer, now_s: float) -> list[Effect]:
        if isinstance(event, PinAnswer):
            if not (event.wrong and "not known yet" in event.wrong[0]):
                self.refused += bool(event.wrong)
                self._open = self._open if isinstance(self._open, ReleasePlan) else None
            return []
        effects: list[Effect] = [SetTimer(now_s + 0.5, Beat())]
        if self._at_s and now_s >= self._at_s[0]:
            self._at_s.pop(0)
            self._open = PinPlan(plan=self._plan())
            self.asked.append(self._open)
        elif now_s >= self._release_s and self.asked:
            self._release_s = math.inf
            self._open = ReleasePlan()
            self.asked.append(self._open)
        if self._open is not None:
            pins = isinstance(self._open, PinPlan)
            subject = subjects.PIN_PLAN if pins else subjects.RELEASE_PLAN
            effects.append(Ask(subject.pattern, self._open, ANSWERS.pattern))
        return effects

    def check(self) -> None:
        assert len(self.asked) <= 3, self.asked

    def _plan(self) -> DeploymentPlan:
        some = self._rng.sample(self._gpus, self._rng.randint(1, min(3, len(self._gpus))))
        return DeploymentPlan(
            plan_id="",
            replicas=tuple(
                ReplicaSpec(
                    replica_id=f"mine-{i}", model_id=MODEL.model_id, parallelism="tp1pp1", gpus=(g,)
                )
                for i, g in enumerate(some)
            ),
        )


class PlannedMesh(Mesh):
    ALSO = ("forecasts",)
    SETTLE_S = 90.0

    def __init__(self, seed: int, *, trace_max: int = 2000) -> None:
        rng = random.Random(f"planned/{seed}")
        self._rng, self._calm = rng, {"calm": False}
        self._last_rps = rng.choice([0.5, 1.0, 1.7, 2.6])
        super().__init__(seed, trace_max=trace_max)
        self._breaks = self.workshop.faults != NO_FAULTS
        gpus = [gpu.gpu_id for gpu in self.topology().gpus()]
        self.person = Person(random.Random(f"person/{seed}"), gpus)
        add = self.world.add
        add(NodeSpec(name="person", make=lambda _n, _p: (self.person, {}), inputs=(ANSWERS,)))
        self.world.watches.append(self._check_pins)
        self.world.at(self.FAULTS_S, lambda: self._calm.update(calm=True))
        self._seen = 0

    def scheduler(self) -> NodeSpec:
        """And, as it is the first of these to be made, who makes the forecasts."""
        rng = random.Random(f"forecasts/{self._rng.random()}")

        def forecasts(_number: int, _port: Port) -> tuple[Core, Mapping[str, Job]]:
            return Forecasts(rng, self._calm, self._last_rps), {}

        self.world.add(NodeSpec(name="forecasts", make=forecasts))

        def make(_number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
            policy = Follows(rng, self._calm)

            def job(problem: Any) -> None:
                took_s = rng.choice([0.02, 0.3, 1.5]) if rng.random() < 0.9 else 4.0
                port.feed(solve(policy, problem), delay_s=0.02 if self._calm["calm"] else took_s)

            return scheduler.Scheduler(CONFIG, self.topology(), policy), {"solve": job}

        return NodeSpec(
            name="scheduler", make=make, inputs=scheduler.INPUTS, queries=scheduler.QUERIES
        )

    def as_wished(self, plan: DeploymentPlan) -> bool:
        """As many replicas as requests per second, or GPUs; or what was pinned. A GPU on which a
        replica broke may be shunned for longer than a run lasts."""
        if plan.pinned:
            return not self.person.released_last
        most = min(len(self.topology().gpus()) - len(self.world.lost), wanted(self._last_rps))
        troubled = self._breaks or bool(self.world.lost)
        return 1 <= len(plan.replicas) <= most and (troubled or len(plan.replicas) == most)

    def _check_pins(self) -> None:
        """What is pinned stays pinned until it is released, or pinned anew."""
        history = self.world.bucket.history
        for write in history[self._seen :]:
            plan = write.message
            assert isinstance(plan, StoredPlan), write
            assert write.key == KEY, write
            for row in plan.in_force.weights.values():
                assert abs(sum(row.values()) - 1.0) < 1e-9, row
            if plan.target is not None and plan.in_force.pinned and not plan.target.pinned:
                released = [ask for ask in self.person.asked if isinstance(ask, ReleasePlan)]
                assert released, f"a pinned plan gave way: {plan}"
        self._seen = len(history)
