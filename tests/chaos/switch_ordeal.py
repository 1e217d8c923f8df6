"""Seeded sequences of switches under load; a process is killed or held in a phase of one of them.

Each sequence begins and ends with a mesh at rest: every process runs, the plan in force serves, no
switch is under way. Which plan that is depends on where the fault struck: the one before or the one
wished for, or what was left of either when a GPU was gone for long enough to plan without it.
"""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from time import monotonic
from typing import Literal

from rich.console import Console
from rich.table import Table

from loadgen.bench.switching import (
    AlreadyInForce,
    News,
    PlanRefused,
    SwitchFailed,
    Switching,
    plan_of,
)
from loadgen.client import ClientOptions, Progress, closed_loop
from loadgen.results import RequestResult
from loadgen.workload.records import TraceRecord
from services.switcher.differences import leaving
from services.switcher.takers import takeovers
from shared.errors import BusUnavailable, DeadlineExceeded
from shared.messages.plans import DeploymentPlan, SwitchProgress, SwitchReport
from shared.messages.replicas import RequestsTaken
from tests.support.watch import MeshWatch

PHASES = ("preparing", "pausing", "taking", "committing", "activating", "retiring")
SWITCHES, STRUCK = 3, 1  # of a sequence, and which of them the fault strikes in
HELD_S = 3.0
SETTLE_TIMEOUT_S = 60.0
PIN_TIMEOUT_S = 20.0
BUSY_MIN = 3  # requests in flight when a switch begins
Kind = Literal["killed", "held"]


@dataclass(frozen=True, slots=True)
class Fault:
    victim: str
    phase: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Draw:
    """A sequence as its seed draws it; the phase is each one in turn, so that none is missed."""

    seed: int
    plans: tuple[DeploymentPlan, ...]
    fault: Fault


@dataclass(slots=True, kw_only=True)
class Told:
    """What became of a sequence."""

    draw: Draw
    struck_in: str = ""  # the phase that was under way when the fault struck; "" between switches
    outcome: str = ""  # what became of the switch that was struck
    reports: list[SwitchReport] = field(default_factory=list[SwitchReport])
    failures: list[str] = field(default_factory=list[str])
    whole_s: float = 0.0  # from the fault, or from when the process may go on
    serves: str = ""  # the plan in force in the end, in words


def draw(
    seed: int, *, gpus: Sequence[str], shapes: Sequence[str], victims: Sequence[str], model_id: str
) -> Draw:
    """``shapes`` like "tp2 tp1 tp1": laid on the GPUs from a random one on. Some replica goes in
    each switch, so that no phase is without anything to do."""
    rng = random.Random(f"switches/{seed}")
    plans: list[DeploymentPlan] = []
    while len(plans) < SWITCHES:
        placed = _placed(rng.choice(shapes), gpus, rng.randrange(len(gpus)))
        plan = plan_of(placed, model_id=model_id)
        if not plans or leaving(plans[-1], plan):
            plans.append(plan)
    fault = Fault(rng.choice(victims), PHASES[seed % len(PHASES)], rng.choice(("killed", "held")))
    return Draw(seed, tuple(plans), fault)


def _placed(shapes: str, gpus: Sequence[str], first: int) -> list[tuple[str, Sequence[str]]]:
    ring = [*gpus[first:], *gpus[:first]]
    placed: list[tuple[str, Sequence[str]]] = []
    for shape in shapes.split():
        size = 1
        for number in shape.removeprefix("tp").split("pp"):
            size *= int(number)
        placed.append((shape, ring[:size]))
        ring = ring[size:]
    return placed


class _Striker:
    """Strikes in the callback that hears of the phase: some phases last a few milliseconds.
    Committing is not told: it follows when the last of ``takers`` has taken requests over."""

    def __init__(self, watch: MeshWatch, told: Told, *, takers: int) -> None:
        self._mesh, self._fault, self._told = watch.mesh, told.draw.fault, told
        self._takers = takers
        self._taken: set[str] = set()
        self._struck = asyncio.Event()

    def hear(self, news: News) -> None:
        phase = news.phase if isinstance(news, SwitchProgress) else ""
        if isinstance(news, RequestsTaken):
            self._taken.add(news.replica_id)
            phase = "committing" if len(self._taken) == self._takers else ""
        if phase == self._fault.phase:
            self.strike(phase)

    def strike(self, phase: str) -> None:
        if self._struck.is_set():
            return
        self._told.struck_in = phase
        killed = self._fault.kind == "killed"
        self._mesh.kill(self._fault.victim, signal.SIGKILL if killed else signal.SIGSTOP)
        self._struck.set()

    async def strike_and_let_go(self) -> None:
        """Once the fault has struck, and the process may go on."""
        await self._struck.wait()
        if self._fault.kind == "held":
            await asyncio.sleep(HELD_S)
            self._mesh.kill(self._fault.victim, signal.SIGCONT)


async def under_load(
    watch: MeshWatch,
    switching: Switching,
    sequences: Sequence[Draw],
    records: Sequence[TraceRecord],
    options: ClientOptions,
    *,
    concurrency: int,
) -> tuple[list[RequestResult], list[Told]]:
    """Walk the sequences while ``records`` are sent in turn, in a closed loop."""
    progress, over = Progress(), asyncio.Event()
    told: list[Told] = []

    def until_over() -> Iterator[TraceRecord]:
        for record in cycle(records):
            if over.is_set():
                return
            yield record

    async def suffer() -> None:
        try:
            for sequence in sequences:
                ended = await endure(watch, switching, sequence, progress)
                told.append(ended)
        except BaseException:
            progress.stop.set()  # nothing to wait for: the test has failed
            raise
        finally:
            over.set()
            show(told)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(suffer())
        results = await closed_loop(
            until_over(), options, concurrency=concurrency, progress=progress
        )
    return results, told


async def endure(
    watch: MeshWatch, switching: Switching, sequence: Draw, progress: Progress
) -> Told:
    """Walk the sequence; raises Unrecovered if the mesh does not come to rest again."""
    told = Told(draw=sequence)
    for number, plan in enumerate(sequence.plans):
        await watch.until(
            lambda: "" if progress.in_flight >= BUSY_MIN else "hardly any request is in flight",
            timeout_s=SETTLE_TIMEOUT_S,
            what=f"before switch {number} of sequence {sequence.seed}",
        )
        if number == STRUCK:
            await _switch_and_strike(watch, switching, plan, told)
        else:
            await _switch(switching, plan, told)
    await until_at_rest(watch)
    told.serves = " ".join(sorted(spec.parallelism for spec in watch.plan.plan.replicas))
    return told


async def until_at_rest(watch: MeshWatch) -> None:
    """Every process runs, and the plan in force serves as it says."""
    await watch.until_whole(since_s=monotonic(), timeout_s=SETTLE_TIMEOUT_S, planned=True)


async def _switch(switching: Switching, plan: DeploymentPlan, told: Told) -> str:
    """What became of it. A switch that a fault ends is no failure of the test: what serves in the
    end is looked at. Nobody knows of a plan's GPUs for a moment after a fault: asked again."""
    deadline_s = monotonic() + PIN_TIMEOUT_S
    while True:
        try:
            seen = await switching.to(plan, timeout_s=SETTLE_TIMEOUT_S)
        except (PlanRefused, BusUnavailable, DeadlineExceeded) as error:
            if monotonic() > deadline_s:
                told.failures.append(str(error))
                return "refused"
            await asyncio.sleep(0.2)
        except AlreadyInForce:
            return "in force before"
        except SwitchFailed as error:
            told.failures.append(str(error))
            return "rolled back"
        else:
            if seen.ended.report is not None:
                told.reports.append(seen.ended.report)
            return "in force"


async def _switch_and_strike(
    watch: MeshWatch, switching: Switching, plan: DeploymentPlan, told: Told
) -> None:
    """Return when the mesh is at rest again. Of a switcher that dies after the commit nobody hears
    that the switch has ended."""
    takers = sum(len(takeover.takers) for takeover in takeovers(watch.plan.plan, plan))
    striker = _Striker(watch, told, takers=takers)
    switching.on_news = striker.hear
    walk = asyncio.create_task(_switch(switching, plan, told))
    strike = asyncio.create_task(striker.strike_and_let_go())
    try:
        await asyncio.wait({walk, strike}, return_when=asyncio.FIRST_COMPLETED)
        striker.strike("")  # refused, or it went without the phase: better late than never
        await strike
        gone_on_s = monotonic()
        await until_at_rest(watch)
        told.whole_s = monotonic() - gone_on_s
        told.outcome = walk.result() if walk.done() else _unheard(watch, plan)
    finally:
        switching.on_news = None
        for task in (walk, strike):
            task.cancel()
        await asyncio.gather(walk, strike, return_exceptions=True)


def _unheard(watch: MeshWatch, plan: DeploymentPlan) -> str:
    serves = set(watch.plan.plan.replicas) == set(plan.replicas)
    return "in force, end unheard" if serves else "not in force, end unheard"


def assert_worth_it(sequences: Sequence[Told]) -> None:
    """Most faults struck in the phase meant, most switches were live, and requests moved."""
    in_time = [told for told in sequences if told.struck_in == told.draw.fault.phase]
    assert len(in_time) >= len(sequences) * 2 // 3, "hardly ever in time"
    reports = [report for told in sequences for report in told.reports]
    assert sum(report.way == "live" for report in reports) > len(reports) // 2
    assert sum(report.moved for report in reports) > 0


def show(sequences: Sequence[Told]) -> None:
    table = Table(
        "seed", "fault", "meant", "struck in", "outcome", "live", "moved", "replayed", "whole s",
        "serves",
    )  # fmt: skip
    for told in sequences:
        fault = told.draw.fault
        live = sum(report.way == "live" for report in told.reports)
        table.add_row(
            str(told.draw.seed),
            f"{fault.victim} {fault.kind}",
            fault.phase,
            told.struck_in or "-",
            told.outcome,
            f"{live} of {len(told.reports)}",
            str(sum(report.moved for report in told.reports)),
            str(sum(report.replayed for report in told.reports)),
            f"{told.whole_s:.1f}",
            told.serves,
        )
    struck = Counter(told.struck_in or "-" for told in sequences)
    Console(width=150).print(table, dict(sorted(struck.items())))
