"""Which engine the topology asks for, and how to build it. Torch is imported only to build one."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from services.worker.engine.interface import Engine
from services.worker.engine.modelled import ModelledEngine, check_settings
from services.worker.engine.torch_engine.config import TorchEngineConfig
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig
from shared.messages.plans import ReplicaSpec
from shared.models import ModelSpec
from shared.text import Tokenizer, byte_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFactory:
    """Builds the replicas' engines. ``build`` may take long and runs in the engine's own thread;
    ``delay_s`` is how long a start lasts besides."""

    build: Callable[[ReplicaSpec], Engine]
    delay_s: float
    running_max: int
    waiting_max: int


def engine_factory(mesh: MeshConfig) -> EngineFactory:
    """The factory for the topology's engine; raises ConfigInvalid for settings that cannot work."""
    if mesh.engine.kind == "torch":
        return _torch_factory(mesh)
    return _modelled_factory(mesh)


def _modelled_factory(mesh: MeshConfig) -> EngineFactory:
    settings = mesh.engine.modelled
    check_settings(settings)
    tokenizer = _tokenizer(mesh.model)

    def build(spec: ReplicaSpec) -> Engine:
        return ModelledEngine(
            settings,
            context_tokens_max=mesh.model.context_tokens_max,
            gpus=Parallelism.parse(spec.parallelism).gpus,
            tokenizer=tokenizer,
        )

    return EngineFactory(
        build=build,
        delay_s=settings.start_s / settings.speedup,
        running_max=settings.running_max,
        waiting_max=settings.waiting_max,
    )


def _tokenizer(model: ModelSpec) -> Tokenizer:
    return load_tokenizer(model.path) if model.path else byte_tokenizer()


def _torch_factory(mesh: MeshConfig) -> EngineFactory:
    try:
        config = msgspec.convert(mesh.engine.torch, TorchEngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigInvalid(
            field="mesh.engine.torch", value=mesh.engine.torch, remedy=str(error)
        ) from None
    config.validate()

    def build(spec: ReplicaSpec) -> Engine:
        if Parallelism.parse(spec.parallelism).gpus > 1:
            raise ConfigInvalid(
                field="parallelism",
                value=spec.parallelism,
                remedy="the torch engine runs on one device: use tp1pp1",
            )
        from services.worker.engine.torch_engine.engine import (  # noqa: PLC0415
            load_torch_engine,  # torch takes seconds and an extra to import: only when asked for
        )

        return load_torch_engine(mesh.model.path, config)

    return EngineFactory(
        build=build, delay_s=0.0, running_max=config.running_max, waiting_max=config.waiting_max
    )
