"""Which engine the topology asks for, and how to build it. Torch is imported only to build one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.worker.engine.interface import Engine
from services.worker.engine.modelled import ModelledEngine
from services.worker.engine.modelled_timing import check_modelled, modelled_replica
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.model_config import read_model_config
from shared.config import Settings
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig
from shared.messages.plans import ReplicaSpec
from shared.models import ModelSpec
from shared.text import Tokenizer, byte_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFactory:
    """Builds the replicas' engines. ``build`` may take long and runs in the engine's own thread;
    ``start_s`` is how long a start lasts at least."""

    build: Callable[[ReplicaSpec], Engine]
    running_max: int
    waiting_max: int
    start_s: Callable[[ReplicaSpec], float] = lambda _: 0.0


def engine_factory(mesh: MeshConfig) -> EngineFactory:
    """The factory for the topology's engine; raises ConfigInvalid for settings that cannot work."""
    if mesh.engine.kind == "torch":
        return _torch_factory(mesh)
    return _modelled_factory(mesh)


def _modelled_factory(mesh: MeshConfig) -> EngineFactory:
    settings = mesh.engine.modelled
    check_modelled(mesh)
    tokenizers = {model.model_id: _tokenizer(model) for model in mesh.models}

    def build(spec: ReplicaSpec) -> Engine:
        return ModelledEngine(
            settings,
            context_tokens_max=mesh.model_of(spec.model_id).context_tokens_max,
            tokenizer=tokenizers[spec.model_id],
            replica=modelled_replica(mesh, spec),
        )

    return EngineFactory(
        build=build,
        running_max=settings.running_max,
        waiting_max=settings.waiting_max,
        start_s=lambda spec: modelled_replica(mesh, spec).start_s,
    )


def _tokenizer(model: ModelSpec) -> Tokenizer:
    return load_tokenizer(model.path) if model.path else byte_tokenizer()


def _torch_factory(mesh: MeshConfig) -> EngineFactory:
    name = "mesh.engine.torch"
    config = Settings({name: mesh.engine.torch}, {}).section(name, TorchEngineConfig)
    try:
        config.validate()
    except ConfigInvalid as error:
        field = f"{name}.{error.field}"
        raise ConfigInvalid(field=field, value=error.value, remedy=error.remedy) from None
    for model in mesh.models:
        _check_checkpoint(model, section=mesh.section_of(model.model_id))

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

        return load_torch_engine(mesh.model_of(spec.model_id).path, config)

    return EngineFactory(
        build=build, running_max=config.running_max, waiting_max=config.waiting_max
    )


def _check_checkpoint(model: ModelSpec, *, section: str) -> None:
    """What a look at the folder shows already is said when the worker starts, not when a plan
    first sends it a replica. Weights are read, and checked, by the engine."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigInvalid(
            field="mesh.engine.kind",
            value="torch",
            remedy="install it: pip install 'oserve[torch]'",
        )
    checkpoint = read_model_config(Path(model.path))
    load_tokenizer(model.path)
    if model.context_tokens_max > checkpoint.context_tokens:
        raise ConfigInvalid(
            field=f"{section}.context_tokens_max",
            value=model.context_tokens_max,
            remedy=f"the checkpoint holds {checkpoint.context_tokens}: use at most that",
        )
