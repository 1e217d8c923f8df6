"""Which engine the topology asks for, and how to build it. Torch is imported only to build one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.engine.interface import Engine, Follower
from services.worker.engine.modelled import ModelledEngine
from services.worker.engine.modelled_copies import modelled_shapes, modelled_start_s
from services.worker.engine.modelled_timing import check_modelled, modelled_replica
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.model_config import ModelConfig, read_model_config
from services.worker.events import EngineStart
from services.worker.peers.server import PeerServer
from shared.config import Settings
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig
from shared.models import ModelSpec
from shared.placement.sheets import ModelShape
from shared.text import Tokenizer, byte_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Building:
    """What an engine under construction and its host share. ``go_on`` is called now and then, and
    raises when the replica is stopped meanwhile; ``fetched`` grows as in Engine.fetched, and goes
    on to do so in later stages."""

    go_on: Callable[[], None] = lambda: None
    fetched: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFactory:
    """Builds the replicas' engines: ``build`` the leading rank's, ``follow`` the parts of others,
    where they have any. Both may take long and run in a thread of their own. ``start_s`` is how
    long a start lasts at least. ``shapes``: of the models whose weights and KV cache can move."""

    build: Callable[[EngineStart, Building], Engine]
    running_max: int
    waiting_max: int
    follow: Callable[[EngineStart, Building], Follower] | None = None
    start_s: Callable[[EngineStart], float] = lambda _: 0.0
    shapes: tuple[ModelShape, ...] = ()


def engine_factory(mesh: MeshConfig, *, peers: PeerServer | None = None) -> EngineFactory:
    """The factory for the topology's engine; without ``peers``, torch replicas have one rank only.
    Raises ConfigInvalid for settings that cannot work."""
    if mesh.engine.kind == "torch":
        return _torch_factory(mesh, peers)
    return _modelled_factory(mesh)


def _modelled_factory(mesh: MeshConfig) -> EngineFactory:
    settings = mesh.engine.modelled
    check_modelled(mesh)
    tokenizers = {model.model_id: _tokenizer(model) for model in mesh.models}
    shapes = modelled_shapes(mesh)

    def build(start: EngineStart, _: Building) -> Engine:
        spec = start.spec
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
        start_s=lambda start: modelled_start_s(mesh, start, shapes[start.spec.model_id]),
        shapes=tuple(shapes.values()),
    )


def _tokenizer(model: ModelSpec) -> Tokenizer:
    return load_tokenizer(model.path) if model.path else byte_tokenizer()


def _torch_factory(mesh: MeshConfig, peers: PeerServer | None) -> EngineFactory:
    name = "mesh.engine.torch"
    config = Settings({name: mesh.engine.torch}, {}).section(name, TorchEngineConfig)
    try:
        config.validate()
    except ConfigInvalid as error:
        field = f"{name}.{error.field}"
        raise ConfigInvalid(field=field, value=error.value, remedy=error.remedy) from None
    checkpoints = {
        model.model_id: _checkpoint(model, section=mesh.section_of(model.model_id))
        for model in mesh.models
    }

    def build(start: EngineStart, building: Building) -> Engine:
        from services.worker.engine.torch_engine.engine import (  # noqa: PLC0415
            build_torch_engine,  # torch takes seconds and an extra to import: only when asked for
            load_torch_engine,
        )

        path = mesh.model_of(start.spec.model_id).path
        if peers is None:
            if len(start.spec.gpus) > 1:
                raise ConfigInvalid(
                    field="parallelism",
                    value=start.spec.parallelism,
                    remedy="without peers to meet, the torch engine runs on one device: use tp1pp1",
                )
            return load_torch_engine(path, config)
        between, fetched = building.go_on, building.fetched
        return build_torch_engine(start, path, config, peers, between=between, fetched=fetched)

    def follow(start: EngineStart, building: Building) -> Follower:
        from services.worker.engine.torch_engine.engine import (  # noqa: PLC0415
            follow_torch_engine,  # as above
        )

        assert peers is not None, "ranks find each other by their peers"
        path = mesh.model_of(start.spec.model_id).path
        between, fetched = building.go_on, building.fetched
        return follow_torch_engine(start, path, config, peers, between=between, fetched=fetched)

    return EngineFactory(
        build=build,
        follow=follow if peers is not None else None,
        running_max=config.running_max,
        waiting_max=config.waiting_max,
        shapes=tuple(
            checkpoint.shape(model_id, config.dtype) for model_id, checkpoint in checkpoints.items()
        ),
    )


def _checkpoint(model: ModelSpec, *, section: str) -> ModelConfig:
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
    return checkpoint
