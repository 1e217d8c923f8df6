"""Switcher service: its core on the bus. Nothing is decided here."""

from services.switcher.config import SwitcherConfig
from services.switcher.core import INPUTS, Switcher
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: SwitcherConfig, context: ServiceContext) -> None:
    wiring = Wiring(inputs=INPUTS, inbox_max=config.inbox_max)
    core = Switcher(config.checked())
    epoch = context.metrics.gauge("plan_epoch", "Epoch of the plan in force")
    epoch.set_function(lambda: core.stored.epoch if core.stored else 0)
    replicas = context.metrics.gauge("plan_replicas", "Replicas of the plan in force")
    replicas.set_function(lambda: len(core.stored.in_force.replicas) if core.stored else 0)
    switching = context.metrics.gauge("plan_switching", "1 while a switch is under way")
    switching.set_function(lambda: core.state != "settled")
    await run(core, wiring, context)
