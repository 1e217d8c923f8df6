"""Scenarios of the scheduler's core as plain text: events in, and what it does about them.

A line that is not indented is an event; the indented lines below it are all that the core then did,
and are written by ``python -m tests.unit.scenarios.update``. So a change of behaviour is a change
of text, to be read and judged. Lines that begin with # are for the reader. The events:

    seconds N                  N seconds pass; living workers and replicas report in each
    forecast MODEL RPS...      so many requests/s are expected of types 0, 1, ...
    observed MODEL RPS...      the profiler's window; ``rejected N`` at its end: so many were
    load REPLICA R W [STEP]    it runs R requests, W wait, and a step takes STEP seconds
    solved                     the slow policy answers
    prompt                     from now on it answers in the second in which it is asked
    raises | answers           from now on the policy raises, or does so no more
    in-force                   the switcher puts what is asked for in force
    rolled-back                it fails to, and the plan in force has a new epoch
    die | leave | back GPU...  a worker falls silent, says that it leaves, is there again
    failed REPLICA GPU         a replica's engine breaks
    pin REPLICA@GPU[+GPU]...   a person asks for that; "pin" alone: for what is in force
    release                    and that planning goes on
    restart                    a scheduler that remembers nothing, and finds the plan stored
    watch SECONDS              the same, which watches for so long what is expected first
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.scheduler.config import SchedulerConfig
from services.scheduler.core import Scheduler
from services.scheduler.events import SchedulerEvent, SolveDeadline, Tick
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.placing import place
from services.scheduler.policies.repair import repair
from services.scheduler.policies.weights import joined, planned
from services.scheduler.solving import solve
from shared.core import Effect, Loaded, Log, Publish, Query, Reply, SetTimer, Start, Started
from shared.hardware import GpuSpec, Parallelism
from shared.mesh import MeshConfig, NodeSpec
from shared.messages.demand import DemandReport, ForecastReport, TypeDemand, TypeForecast
from shared.messages.plans import (
    AdoptPlan,
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    PlanInForce,
    PlanKept,
    PlanProposed,
    ReleasePlan,
    ReplicaSpec,
    StoredPlan,
)
from shared.messages.replicas import ReplicaFailed, ReplicaReport, WorkerReport
from shared.models import ModelSpec

FOLDER = Path(__file__).parent / "scenarios"
EMPTY = DeploymentPlan(plan_id="none")
MESH = MeshConfig(
    model=ModelSpec(model_id="m"),
    more_models=(ModelSpec(model_id="idle"),),
    nodes=(NodeSpec(node_id="n0", gpus=4),),
)
CONFIG = SchedulerConfig(
    policy="oserve", solve_timeout_s=20.0, replicas_min={"idle": 0}, start_wait_s=3.0, watch_s=0.0
)


@dataclass
class OneEach:
    """A policy: a replica of one GPU for each request per second, types on replicas in turn, until
    GPUs run out. It changes its mind whenever the numbers do."""

    raises: bool = False
    slow = True
    period_s = 30.0

    def start(self, problem: Problem) -> Planned:
        if problem.in_force.replicas:
            return repair(problem, why="nothing is planned for yet")
        return self._planned(problem, {("m", Parallelism()): 1}, "to begin with")

    def plan(self, problem: Problem) -> Planned:
        if self.raises:
            raise ArithmeticError("no such number")
        wanted = {
            (demand.model_id, Parallelism()): math.ceil(demand.arrivals_rps)
            for demand in problem.models
            if demand.types
        }
        expected = sum(demand.arrivals_rps for demand in problem.models)
        return self._planned(problem, wanted, f"one replica for each of {expected:g} requests/s")

    def _planned(
        self, problem: Problem, wanted: dict[tuple[str, Parallelism], int], why: str
    ) -> Planned:
        placed = place(wanted, problem.offers, problem.in_force)
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for demand in problem.models:
            own = [s.replica_id for s in placed.replicas if s.model_id == demand.model_id]
            if not own:
                continue
            rows[demand.model_id] = {"*": dict.fromkeys(own, 1.0)}
            for kind in demand.types if len(demand.types) > 1 else ():
                turn = own[kind.request_type % len(demand.types) :: len(demand.types)] or own
                rows[demand.model_id][str(kind.request_type)] = dict.fromkeys(turn, 1.0)
        dropped = tuple(f"{model_id} {shape}" for model_id, shape in placed.dropped)
        missing = f"; no GPU for {len(dropped)} more" if dropped else ""
        return planned(placed.replicas, joined(rows), reason=why + missing, dropped=dropped)


class Scenario:
    """One core, and what stands around it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.policy, self.config = OneEach(), CONFIG
        self.alive = dict.fromkeys((gpu.gpu_id for gpu in MESH.gpus()), True)
        self.loads: dict[str, tuple[int, int, float]] = {}
        self.stored = StoredPlan(epoch=0, in_force=EMPTY)
        self.adopt: AdoptPlan | None = None
        self.lines: list[str] = []
        self.is_prompt = self.asked = False
        self.restart()

    def run(self, text: str) -> str:
        """The scenario with what happened written below each event."""
        result: list[str] = []
        for line in text.splitlines():
            if line.startswith("  "):
                continue
            result.append(line)
            if line and not line.startswith("#"):
                self.lines = []
                words = line.split()
                EVENTS[words[0].replace("-", "_")](self, *words[1:])
                result += [f"  {line}" for line in self.lines]
        return "\n".join([*result, ""])

    def step(self, event: SchedulerEvent) -> None:
        effects = self.core.step(event, self.now_s)
        self.core.check()
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timers.append((effect.at_s, effect.event))
            self.lines += self._told(effect)

    def _told(self, effect: Effect) -> Iterator[str]:
        at = f"{self.now_s:g} s"
        match effect:
            case Publish(message=AdoptPlan() as adopt):
                known = self.adopt and self.adopt.plan.plan_id == adopt.plan.plan_id
                if not known or self.adopt is None or adopt.based_on_epoch != self.epoch_asked:
                    yield f"{at}: ask for {shown(adopt.plan)}, on epoch {adopt.based_on_epoch}"
                self.adopt, self.epoch_asked = adopt, adopt.based_on_epoch
            case Publish(message=PlanProposed(reason=reason)):
                yield f"{at}: because {reason}"
            case Publish(message=PlanKept(reason=reason)):
                yield f"{at}: keep: {reason}"
            case Start(argument=Problem() as problem):
                self.problem, self.asked = problem, True
                yield f"{at}: solve for {len(problem.offers)} GPUs"
            case Reply(message=PinAnswer() as answer):
                yield f"{at}: answer: {'; '.join(answer.wrong) or 'yes'}"
            case Log(event=event, fields=fields) if event not in SAID_OTHERWISE:
                words = ", ".join(f"{k} {v}" for k, v in fields.items() if k in LOGGED)
                yield f"{at}: log {event}{': ' if words else ''}{words}"
            case _:
                pass

    # The events

    def seconds(self, count: str) -> None:
        for _ in range(int(count)):
            self.now_s += 1.0
            for gpu, alive in self.alive.items():
                if alive:
                    self.step(report(gpu))
            self.step(PlanInForce(epoch=self.stored.epoch, plan=self.stored.in_force))
            for spec in self.stored.in_force.replicas:
                if spec.replica_id in self.loads and self.alive[spec.gpus[0]]:
                    self.step(self._load(spec))
            due = [timer for timer in self.timers if timer[0] <= self.now_s]
            self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
            for _, event in due:
                assert isinstance(event, Tick | SolveDeadline)
                self.step(event)
            if self.is_prompt and self.asked:
                self.solved()

    def forecast(self, model_id: str, *rates: str) -> None:
        types = tuple(
            TypeForecast(
                request_type=i,
                arrivals_rps=float(rps),
                input_tokens_mean=100.0,
                output_tokens_mean=100.0,
            )
            for i, rps in enumerate(rates)
        )
        made_at_s = self.now_s
        self.step(
            ForecastReport(model_id=model_id, made_at_s=made_at_s, horizon_s=30.0, types=types)
        )

    def observed(self, model_id: str, *words: str) -> None:
        at = words.index("rejected") if "rejected" in words else len(words)
        types = tuple(
            TypeDemand(
                request_type=i,
                requests=int(10 * float(rps)),
                arrivals_rps=float(rps),
                input_tokens_mean=100.0,
                output_tokens_mean=100.0,
                input_tokens_centroid=100.0,
                output_tokens_centroid=100.0,
            )
            for i, rps in enumerate(words[:at])
        )
        self.step(
            DemandReport(
                model_id=model_id,
                window_start_s=self.now_s - 10.0,
                window_s=10.0,
                types=types,
                rejected=int(words[at + 1]) if at < len(words) else 0,
            )
        )

    def load(self, replica_id: str, running: str, waiting: str, step_s: str = "0.02") -> None:
        self.loads[replica_id] = (int(running), int(waiting), float(step_s))

    def prompt(self) -> None:
        self.is_prompt = True

    def solved(self) -> None:
        self.asked = False
        self.step(solve(self.policy, self.problem))

    def raises(self) -> None:
        self.policy.raises = True

    def answers(self) -> None:
        self.policy.raises = False

    def in_force(self) -> None:
        assert self.adopt is not None
        self._store(self.adopt.plan)

    def rolled_back(self) -> None:
        self._store(self.stored.in_force)

    def die(self, *gpus: str) -> None:
        self.alive |= dict.fromkeys(gpus, False)

    def leave(self, *gpus: str) -> None:
        self.die(*gpus)
        for gpu in gpus:
            self.step(report(gpu, leaving=True))

    def back(self, *gpus: str) -> None:
        self.alive |= dict.fromkeys(gpus, True)

    def failed(self, replica_id: str, gpu: str) -> None:
        self.step(
            ReplicaFailed(epoch=1, worker_id=gpu, replica_id=replica_id, detail="engine broke")
        )

    def refused(self, replica_id: str, gpu: str) -> None:
        self.step(
            ReplicaFailed(
                epoch=1, worker_id=gpu, replica_id=replica_id, detail="it drains", refused=True
            )
        )

    def pin(self, *replicas: str) -> None:
        parts = [replica.partition("@") for replica in replicas]
        specs = tuple(
            ReplicaSpec(
                replica_id=id_, model_id="m", parallelism=f"tp{len(gpus.split('+'))}pp1",
                gpus=tuple(gpus.split("+")),
            )
            for id_, _, gpus in parts
        )  # fmt: skip
        plan = DeploymentPlan(plan_id="", replicas=specs) if specs else self.stored.in_force
        self.step(Query(PinPlan(plan=plan), "cli"))

    def release(self) -> None:
        self.step(Query(ReleasePlan(), "cli"))

    def restart(self) -> None:
        self.core = Scheduler(self.config, MESH, self.policy)
        self.timers: list[tuple[float, object]] = []
        self.adopt, self.epoch_asked = None, -1
        self.step(Started())
        self.step(Loaded(key="plan", message=self.stored, revision=1))

    def watch(self, watch_s: str) -> None:
        self.config = msgspec.structs.replace(CONFIG, watch_s=float(watch_s))
        self.restart()

    def _store(self, plan: DeploymentPlan) -> None:
        self.stored = StoredPlan(epoch=self.stored.epoch + 1, in_force=plan)
        self.step(PlanInForce(epoch=self.stored.epoch, plan=plan))

    def _load(self, spec: ReplicaSpec) -> ReplicaReport:
        running, waiting, step_s = self.loads[spec.replica_id]
        return ReplicaReport(
            replica_id=spec.replica_id, worker_id=spec.gpus[0], incarnation="i", epoch=1,
            phase="serving", running=running, waiting=waiting, running_max=64,
            kv_blocks_total=1000, step_s=step_s,
        )  # fmt: skip


EVENTS: dict[str, Callable[..., None]] = {
    event.__name__: event
    for event in (
        Scenario.seconds, Scenario.forecast, Scenario.observed, Scenario.load, Scenario.solved,
        Scenario.prompt, Scenario.raises, Scenario.answers, Scenario.in_force,
        Scenario.rolled_back, Scenario.die, Scenario.leave, Scenario.back, Scenario.failed,
        Scenario.refused, Scenario.pin, Scenario.release, Scenario.restart, Scenario.watch,
    )
}  # fmt: skip
SAID_OTHERWISE = ("plan.proposed", "plan.kept", "solve.started", "solve.ended")
LOGGED = ("why", "wrong", "reason", "model_id", "goes_by", "worker_id", "age_s")


def report(gpu: str, *, leaving: bool = False) -> WorkerReport:
    return WorkerReport(
        worker_id=gpu, incarnation="i", node_id="n0", gpu=GpuSpec(gpu_id=gpu),
        models=("m", "idle"), leaving=leaving,
    )  # fmt: skip


def shown(plan: DeploymentPlan) -> str:
    """Replicas with their GPUs, and the shares of each row in their order."""
    ids = [spec.replica_id for spec in plan.replicas]
    where = ", ".join(
        f"{s.replica_id}@{'+'.join(g.partition('-')[2] for g in s.gpus)}" for s in plan.replicas
    )
    rows = "; ".join(
        f"{name} {' '.join(f'{row.get(id_, 0.0):.2f}' for id_ in ids)}"
        for name, row in plan.weights.items()
    )
    return f"{where} ({rows}){' pinned' if plan.pinned else ''}"


def scenarios() -> list[Path]:
    return sorted(FOLDER.glob("*.txt"))
