"""Scheduler service: its core on the bus. Nothing is decided here."""

from services.scheduler.config import SchedulerConfig
from services.scheduler.core import INPUTS, Scheduler
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: SchedulerConfig, context: ServiceContext) -> None:
    wiring = Wiring(inputs=INPUTS, inbox_max=config.inbox_max)
    await run(Scheduler(config.checked(), context.mesh), wiring, context)
