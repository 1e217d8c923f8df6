"""Wires the profiler core to the mesh."""

from services.profiler.config import ProfilerConfig
from services.profiler.core import INPUTS, Profiler
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: ProfilerConfig, context: ServiceContext) -> None:
    """Profile until told to end."""
    config.checked()
    core = Profiler(
        config,
        models=(context.mesh.model.model_id,),
        unix_offset_s=context.clock.unix_s() - context.clock.now_s(),
    )
    await run(core, Wiring(inputs=INPUTS, inbox_max=config.inbox_max), context)
