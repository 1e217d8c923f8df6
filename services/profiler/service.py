"""Wires the profiler core to the mesh."""

from services.profiler.config import ProfilerConfig
from services.profiler.core import INPUTS, Profiler
from shared.errors import ConfigInvalid
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: ProfilerConfig, context: ServiceContext) -> None:
    """Profile until told to end."""
    config.checked()
    num_models = len(context.mesh.models)
    if num_models > config.models_max:
        raise ConfigInvalid(
            field="profiler.models_max",
            value=config.models_max,
            remedy=f"the topology has {num_models} models: use {num_models} or more",
        )
    core = Profiler(
        config,
        models=context.mesh.model_ids,
        unix_offset_s=context.clock.unix_s() - context.clock.now_s(),
    )
    await run(core, Wiring(inputs=INPUTS, inbox_max=config.inbox_max), context)
