"""``oserve switch``: brings a running mesh to other shapes, and tells how that went.

The plan is made here, of the shapes asked for and of what the mesh says of itself, and pinned as
``oserve adopt`` does. The switcher walks to it; what it says on the way is shown.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from deploy.adopt import ask
from deploy.status import LATE_S, LISTEN_S, find_mesh
from deploy.switch_view import Bar, report_lines
from deploy.switch_watch import SwitchOutcome, SwitchWatch
from deploy.why import WhichMesh
from deploy.why_plan import in_words
from loadgen.planning.plan_file import read_plan
from loadgen.planning.target import offers_of, read_shapes, target_plan, which_model
from shared import subjects
from shared.bus import Bus, BusConfig, Delivery, NatsBus
from shared.errors import BusUnavailable, DeadlineExceeded
from shared.messages.base import decode
from shared.messages.plans import DeploymentPlan, PinPlan, PlanInForce, SwitchProgress
from shared.messages.replicas import WorkerReport

EXIT_SWITCHED, EXIT_FAILED, EXIT_LATE = 0, 1, 124  # the last as `timeout` has it
PLAN_FILE = ".toml"
_CONNECT_S = 2.0


def run_switch(to: str, which: WhichMesh, *, model_id: str, timeout_s: float, as_json: bool) -> int:
    """Switch to ``to`` (shapes, or the path of a plan file), show it, and print the report; the
    exit code. Raises ConfigInvalid."""
    if not _is_file(to):
        read_shapes(to)  # what is misspelt needs no mesh to be told so
    try:
        config, _ = find_mesh(
            topology=which.topology, data_dir=which.data_dir, bus_url=which.bus_url
        )
        outcome = asyncio.run(
            _connected(config, to, model_id=model_id, timeout_s=timeout_s, as_json=as_json)
        )
    except BusUnavailable as error:
        outcome = SwitchOutcome(failure=f"{error}")
    except DeadlineExceeded as error:
        outcome = SwitchOutcome(
            failure=f"{error}: the scheduler is busy or hangs, see `oserve status` and its log"
        )
    return tell(outcome, as_json=as_json)


def tell(outcome: SwitchOutcome, *, as_json: bool) -> int:
    """Print how it ended; the exit code."""
    if as_json:
        _console().print(msgspec.json.encode(outcome).decode())
    elif outcome.succeeded:
        for line in report_lines(outcome):
            _console().print(line)
    if not outcome.succeeded:
        _console(stderr=True).print(f"oserve switch: {outcome.failure}")
    if outcome.timed_out:
        return EXIT_LATE
    return EXIT_SWITCHED if outcome.succeeded else EXIT_FAILED


async def switch(
    bus: Bus,
    to: str,
    *,
    model_id: str = "",
    timeout_s: float,
    listen_s: float = LISTEN_S,
    on_progress: Callable[[SwitchProgress], None] | None = None,
) -> SwitchOutcome:
    """Ask for ``to`` and wait until it is in force. Raises as the two that it calls."""
    plan = await plan_for(bus, to, model_id=model_id, listen_s=listen_s)
    return await switch_to(bus, plan, timeout_s=timeout_s, on_progress=on_progress)


async def plan_for(
    bus: Bus, to: str, *, model_id: str = "", listen_s: float = LISTEN_S
) -> DeploymentPlan:
    """The plan that ``to`` means in this mesh. ``listen_s``: for how long workers are listened to
    before GPUs are chosen. Raises ConfigInvalid, BusUnavailable."""
    if _is_file(to):
        return read_plan(Path(to))
    workers, in_force = await _look(bus, listen_s=listen_s)
    return _planned(to, model_id, workers, in_force)


async def switch_to(
    bus: Bus,
    plan: DeploymentPlan,
    *,
    timeout_s: float,
    on_progress: Callable[[SwitchProgress], None] | None = None,
) -> SwitchOutcome:
    """Pin ``plan`` and wait until it is in force. Raises BusUnavailable, DeadlineExceeded."""
    async with SwitchWatch(bus, on_progress=on_progress) as watch:
        answer = await ask(bus, subjects.PIN_PLAN, PinPlan(plan=plan))
        if answer.wrong:
            refusal = f"the scheduler refuses: {'; '.join(answer.wrong)}"
            return SwitchOutcome(plan=in_words(plan.replicas), failure=refusal)
        outcome = await watch.until_ended(answer.plan_id, wait_s=timeout_s)
    return msgspec.structs.replace(outcome, plan=in_words(plan.replicas))


def _planned(
    to: str, model_id: str, workers: list[WorkerReport], in_force: PlanInForce
) -> DeploymentPlan:
    counts, offers = read_shapes(to), offers_of(workers)
    return target_plan(
        counts,
        which_model(model_id, in_force.plan, offers),
        offers=offers,
        in_force=in_force.plan,
        epoch=in_force.epoch,
        taken={held.replica_id for report in workers for held in report.replicas},
    )


async def _look(bus: Bus, *, listen_s: float) -> tuple[list[WorkerReport], PlanInForce]:
    """Which workers there are, and what is in force. Raises BusUnavailable."""
    newest: dict[str, WorkerReport] = {}

    def on_report(delivery: Delivery) -> None:
        report = decode(delivery.payload, WorkerReport)
        newest[report.worker_id] = report

    listening = await bus.subscribe(subjects.WORKER_REPORT.wildcard, on_report)
    try:
        async with SwitchWatch(bus) as watch:
            await asyncio.sleep(listen_s)
            in_force = await watch.until_heard(wait_s=LATE_S)
    finally:
        await listening.unsubscribe()
    if in_force is None:
        raise BusUnavailable("no switcher says which plan is in force, see `oserve status`")
    return list(newest.values()), in_force


async def _connected(
    config: BusConfig, to: str, *, model_id: str, timeout_s: float, as_json: bool
) -> SwitchOutcome:
    bus = NatsBus(msgspec.structs.replace(config, connect_timeout_s=_CONNECT_S))
    await bus.connect(name="oserve-switch")
    try:
        with Bar(_console(stderr=as_json)) as bar:
            return await switch(
                bus, to, model_id=model_id, timeout_s=timeout_s, on_progress=bar.show
            )
    finally:
        await bus.close()


def _is_file(to: str) -> bool:
    return to.endswith(PLAN_FILE) or Path(to).is_file()


def _console(*, stderr: bool = False) -> Console:
    """Prints what it is given as it is."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
