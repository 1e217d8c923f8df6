"""Wires the forecaster core to the mesh."""

from services.forecaster.config import ForecasterConfig
from services.forecaster.core import INPUTS, Forecaster
from shared.errors import ConfigInvalid
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: ForecasterConfig, context: ServiceContext) -> None:
    """Forecast until told to end."""
    config.checked()
    num_models = len(context.mesh.models)
    if num_models > config.models_max:
        raise ConfigInvalid(
            field="forecaster.models_max",
            value=config.models_max,
            remedy=f"the topology has {num_models} models: use {num_models} or more",
        )
    core = Forecaster(
        config,
        unix_offset_s=context.clock.unix_s() - context.clock.now_s(),
    )
    await run(core, Wiring(inputs=INPUTS, inbox_max=config.inbox_max), context)
