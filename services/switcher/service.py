"""Switcher service: its core on the bus, and a thread for the planner of copies, which takes its
time. Nothing is decided here."""

import asyncio
import threading
from contextlib import suppress

import msgspec

from services.switcher.config import SwitcherConfig
from services.switcher.core import INPUTS, PLAN_TRANSFER, Switcher
from services.switcher.events import TransferPlanned, TransferWanted
from services.switcher.planning import plan
from shared.clock import Clock
from shared.runtime import Job, Wiring
from shared.service import ServiceContext, run


async def serve(config: SwitcherConfig, context: ServiceContext) -> None:
    wiring = Wiring(
        inputs=INPUTS, jobs={PLAN_TRANSFER: planner(context.clock)}, inbox_max=config.inbox_max
    )
    core = Switcher(config.checked())
    epoch = context.metrics.gauge("plan_epoch", "Epoch of the plan in force")
    epoch.set_function(lambda: core.stored.epoch if core.stored else 0)
    replicas = context.metrics.gauge("plan_replicas", "Replicas of the plan in force")
    replicas.set_function(lambda: len(core.stored.in_force.replicas) if core.stored else 0)
    switching = context.metrics.gauge("plan_switching", "1 while a switch is under way")
    switching.set_function(lambda: core.state != "settled")
    await run(core, wiring, context)


def planner(clock: Clock) -> Job:
    """The job ``plan_transfer``. The core starts one for each live switch. Its thread is a daemon:
    a process told to end does not wait for copies that nobody will make."""

    async def job(wanted: TransferWanted) -> TransferPlanned:
        loop, outcome = asyncio.get_running_loop(), asyncio.Queue[TransferPlanned](1)
        started_s = clock.now_s()

        def work() -> None:
            planned = plan(wanted)
            with suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(outcome.put_nowait, planned)

        threading.Thread(target=work, name="plan_transfer", daemon=True).start()
        planned = await outcome.get()
        return msgspec.structs.replace(planned, took_s=clock.now_s() - started_s)

    return job
