"""Switcher service: its core on the bus. Nothing is decided here."""

from services.switcher.config import SwitcherConfig
from services.switcher.core import INPUTS, Switcher
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: SwitcherConfig, context: ServiceContext) -> None:
    wiring = Wiring(inputs=INPUTS, inbox_max=config.inbox_max)
    await run(Switcher(config.checked()), wiring, context)
