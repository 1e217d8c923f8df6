"""Seeded sequences of switches under load; a process is killed or held in a phase of one of them.

Each sequence begins and ends with a mesh at rest: every process runs, the plan in force serves, no
switch is under way. Which plan that is depends on where the fault struck: the one before or the one
wished for, or what was left of either when a GPU was gone for long enough to plan without it.
"""

import asyncio
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from time import monotonic
from typing import Literal

from rich.console import Console
from rich.table import Table

from loadgen.bench.switching import SwitchFailed, Switching, plan_of
from loadgen.client import Progress
from shared.errors import BusUnavailable, DeadlineExceeded
from shared.messages.plans import DeploymentPlan, SwitchReport
from tests.support.watch import MeshWatch

PHASES = ("preparing", "pausing", "taking", "committing", "activating", "retiring")
SWITCHES = 3  # of a sequence; the fault strikes in the second
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
    """A sequence as its seed draws it."""

    seed: int
    plans: tuple[DeploymentPlan, ...]
    fault: Fault


@dataclass(slots=True, kw_only=True)
class Told:
    """What became of a sequence."""

    draw: Draw
    struck_in: str  # the phase that was under way when the fault struck; "" between switches
    reports: list[SwitchReport]
    failures: list[str]
    whole_s: float
    serves: str  # the plan in force in the end, in words


def draw(
    seed: int, *, gpus: Sequence[str], shapes: Sequence[str], victims: Sequence[str], model_id: str
) -> Draw:
    """``shapes`` like "tp2 tp1 tp1": laid on the GPUs from a random one on."""
    rng = random.Random(f"switches/{seed}")
    plans: list[DeploymentPlan] = []
    last = ""
    for _ in range(SWITCHES):
        last = rng.choice([shape for shape in shapes if shape != last])
        plans.append(plan_of(_placed(last, gpus, rng.randrange(len(gpus))), model_id=model_id))
    fault = Fault(rng.choice(victims), rng.choice(PHASES), rng.choice(("killed", "held")))
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


async def endure(
    watch: MeshWatch, switching: Switching, sequence: Draw, progress: Progress
) -> Told:
    """Walk the sequence; raises Unrecovered if the mesh does not come to rest again."""
    told = Told(draw=sequence, struck_in="", reports=[], failures=[], whole_s=0.0, serves="")
    for number, plan in enumerate(sequence.plans):
        await watch.until(
            lambda: "" if progress.in_flight >= BUSY_MIN else "hardly any request is in flight",
            timeout_s=SETTLE_TIMEOUT_S,
            what=f"before switch {number} of sequence {sequence.seed}",
        )
        if number != 1:
            await _switch(switching, plan, told)
            continue
        walk = asyncio.create_task(_switch(switching, plan, told))
        try:
            await _strike(watch, switching, sequence.fault, walk, told)
        finally:
            await asyncio.gather(walk, return_exceptions=True)
        struck_s = monotonic()
        await until_at_rest(watch)
        told.whole_s = monotonic() - struck_s
    await until_at_rest(watch)
    told.serves = " ".join(sorted(spec.parallelism for spec in watch.plan.plan.replicas))
    return told


async def until_at_rest(watch: MeshWatch) -> None:
    """Every process runs, and the plan in force serves as it says."""
    await watch.until_whole(since_s=monotonic(), timeout_s=SETTLE_TIMEOUT_S, planned=True)


async def _switch(switching: Switching, plan: DeploymentPlan, told: Told) -> None:
    """A switch that a fault ends is no failure of the test: what serves in the end is looked at."""
    deadline_s = monotonic() + PIN_TIMEOUT_S
    while True:
        try:
            seen = await switching.to(plan, timeout_s=SETTLE_TIMEOUT_S)
        except SwitchFailed as error:
            told.failures.append(str(error))
            return
        except (BusUnavailable, DeadlineExceeded) as error:
            if monotonic() > deadline_s:
                told.failures.append(str(error))
                return
            await asyncio.sleep(0.2)
        else:
            if seen.ended.report is not None:
                told.reports.append(seen.ended.report)
            return


async def _strike(
    watch: MeshWatch, switching: Switching, fault: Fault, walk: asyncio.Task[None], told: Told
) -> None:
    """In the phase, or when the switch is over: some phases last a millisecond."""
    reached = asyncio.create_task(switching.until_phase(fault.phase))
    await asyncio.wait({walk, reached}, return_when=asyncio.FIRST_COMPLETED)
    reached.cancel()
    told.struck_in = switching.phase
    mesh = watch.mesh
    if fault.kind == "killed":
        mesh.kill(fault.victim)
        return
    mesh.kill(fault.victim, signal.SIGSTOP)
    await asyncio.sleep(HELD_S)
    mesh.kill(fault.victim, signal.SIGCONT)


def show(sequences: Sequence[Told]) -> None:
    table = Table(
        "seed", "fault", "meant", "struck in", "live", "moved", "replayed", "whole s", "serves"
    )
    for told in sequences:
        fault = told.draw.fault
        live = sum(report.way == "live" for report in told.reports)
        table.add_row(
            str(told.draw.seed),
            f"{fault.victim} {fault.kind}",
            fault.phase,
            told.struck_in or "-",
            f"{live} of {len(told.reports)}",
            str(sum(report.moved for report in told.reports)),
            str(sum(report.replayed for report in told.reports)),
            f"{told.whole_s:.1f}",
            told.serves,
        )
    struck = sorted(told.struck_in or "-" for told in sequences)
    phases = ", ".join(f"{name} {len(list(found))}" for name, found in groupby(struck))
    Console(width=150).print(table, f"struck in: {phases}")
