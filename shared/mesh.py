"""The mesh as its operator wishes it: model, engine, nodes, replicas, from the topology file."""

import re
from typing import Any, Literal

import msgspec

from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec, Parallelism
from shared.ids import checked_id
from shared.models import ModelSpec

EngineKind = Literal["modelled", "torch"]

CONTEXT_TOKENS_MIN = 2  # one of prompt, one of output
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host. Its GPUs, and so its workers, are named ``<node_id>-g<index>``."""

    node_id: str
    gpus: int = 1
    gpu_kind: str = "cpu"
    gpu_memory_bytes: int = 0

    def gpu_specs(self) -> tuple[GpuSpec, ...]:
        return tuple(
            GpuSpec(
                gpu_id=f"{self.node_id}-g{i}",
                kind=self.gpu_kind,
                memory_bytes=self.gpu_memory_bytes,
            )
            for i in range(self.gpus)
        )


class ModelledEngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Timing of the modelled engine. ``profile``: step times, KV capacity and start-up of the cost
    profile of the replica's GPU kind and model. ``settings``: a small model given here, in which a
    step takes ``base_s`` plus a linear term each for prompt tokens prefilled, requests decoded and
    tokens of context attended to, with ``kv_blocks`` for each GPU."""

    timing: Literal["settings", "profile"] = "settings"
    prefix_caching: bool = False
    base_s: float = 0.004
    prefill_token_s: float = 0.00002
    decode_token_s: float = 0.0001
    context_token_s: float = 0.0
    start_s: float = 0.5
    speedup: float = 1.0
    block_tokens: int = 16
    kv_blocks: int = 8192
    batch_tokens_max: int = 2048
    running_max: int = 256
    waiting_max: int = 1024
    eos_probability: float = 0.0


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which engine the workers run. ``torch`` holds that engine's own settings, which only the
    worker understands and checks."""

    kind: EngineKind = "modelled"
    modelled: ModelledEngineSettings = msgspec.field(default_factory=ModelledEngineSettings)
    torch: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class ReplicaWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A replica the operator asks for; without ``gpus`` the scheduler places it, without
    ``model_id`` it serves the topology's first model."""

    replica_id: str
    model_id: str = ""
    parallelism: str = "tp1pp1"
    gpus: tuple[str, ...] = ()


class MeshConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The topology: what there is, and what should serve on it. ``more_models`` share the nodes
    with ``model``."""

    name: str = "mesh"
    model: ModelSpec = msgspec.field(default_factory=lambda: ModelSpec(model_id="modelled"))
    more_models: tuple[ModelSpec, ...] = ()
    engine: EngineSpec = msgspec.field(default_factory=EngineSpec)
    nodes: tuple[NodeSpec, ...] = ()
    replicas: tuple[ReplicaWish, ...] = ()

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        return (self.model, *self.more_models)

    @property
    def model_ids(self) -> tuple[str, ...]:
        return tuple(model.model_id for model in self.models)

    def model_of(self, model_id: str) -> ModelSpec:
        """The model of that id, the first one for ""; raises ConfigInvalid."""
        for model in self.models:
            if model_id in ("", model.model_id):
                return model
        raise ConfigInvalid(
            field="model_id", value=model_id, remedy=f"known models: {', '.join(self.model_ids)}"
        )

    def section_of(self, model_id: str) -> str:
        """Where the topology says it, for error texts."""
        first = model_id in ("", self.model.model_id)
        return "mesh.model" if first else f"mesh.more_models.{model_id}"

    def gpus(self) -> tuple[GpuSpec, ...]:
        return tuple(gpu for node in self.nodes for gpu in node.gpu_specs())

    def node_of(self, gpu_id: str) -> str:
        """The node that holds ``gpu_id``; raises ConfigInvalid."""
        for node in self.nodes:
            if any(gpu.gpu_id == gpu_id for gpu in node.gpu_specs()):
                return node.node_id
        raise ConfigInvalid(
            field="gpu",
            value=gpu_id,
            remedy="name a GPU of a node in the topology's [[mesh.nodes]]",
        )

    def checked(self) -> "MeshConfig":
        """Self, if its parts fit together; raises ConfigInvalid."""
        known = [gpu.gpu_id for gpu in self.gpus()]
        _check_nodes(self.nodes)
        self._check_models()
        owner: dict[str, str] = {}
        wished: set[str] = set()
        for wish in self.replicas:
            if wish.replica_id in wished:
                raise ConfigInvalid(
                    field="mesh.replicas.replica_id",
                    value=wish.replica_id,
                    remedy="give each replica its own id",
                )
            wished.add(wish.replica_id)
            _check_wish(wish, known=known, owner=owner, mesh=self)
        return self

    def _check_models(self) -> None:
        seen: set[str] = set()
        for index, model in enumerate(self.models):
            table = "mesh.more_models" if index else "mesh.model"
            _check_model_id(f"{table}.model_id", model.model_id, seen)
            name = self.section_of(model.model_id)
            if model.context_tokens_max < CONTEXT_TOKENS_MIN:
                raise ConfigInvalid(
                    field=f"{name}.context_tokens_max",
                    value=model.context_tokens_max,
                    remedy=f"use {CONTEXT_TOKENS_MIN} or more: prompt and output share it",
                )
            if self.engine.kind == "torch" and not model.path:
                raise ConfigInvalid(
                    field=f"{name}.path",
                    value="",
                    remedy="the torch engine needs a checkpoint folder (`oserve make-model DIR`)",
                )


def _check_model_id(field: str, model_id: str, seen: set[str]) -> None:
    if not _MODEL_ID.fullmatch(model_id):
        raise ConfigInvalid(
            field=field,
            value=model_id,
            remedy="use 1 to 128 letters, digits and '._:/@+-', a letter or digit first",
        )
    if model_id in seen:
        raise ConfigInvalid(field=field, value=model_id, remedy="give each model its own id")
    seen.add(model_id)


def _check_nodes(nodes: tuple[NodeSpec, ...]) -> None:
    seen: set[str] = set()
    for node in nodes:
        node_id = checked_id("mesh.nodes.node_id", node.node_id)
        if node_id in seen:
            raise ConfigInvalid(
                field="mesh.nodes.node_id", value=node_id, remedy="give each node its own id"
            )
        seen.add(node_id)
        if node.gpus < 1:
            raise ConfigInvalid(
                field=f"mesh.nodes.{node_id}.gpus", value=node.gpus, remedy="give it 1 or more"
            )


def _check_wish(
    wish: ReplicaWish, *, known: list[str], owner: dict[str, str], mesh: MeshConfig
) -> None:
    field = f"mesh.replicas.{checked_id('mesh.replicas.replica_id', wish.replica_id)}"
    if wish.model_id and wish.model_id not in mesh.model_ids:
        names = ", ".join(mesh.model_ids)
        raise ConfigInvalid(
            field=f"{field}.model_id",
            value=wish.model_id,
            remedy=f"name a model of mesh.model or [[mesh.more_models]]: {names}",
        )
    shape = Parallelism.parse(wish.parallelism)
    if wish.gpus and len(wish.gpus) != shape.gpus:
        raise ConfigInvalid(
            field=f"{field}.gpus", value=wish.gpus, remedy=f"{shape} needs {shape.gpus} GPUs"
        )
    for gpu in wish.gpus:
        if gpu not in known:
            raise ConfigInvalid(field=f"{field}.gpus", value=gpu, remedy=f"known GPUs: {known}")
        if gpu in owner:
            raise ConfigInvalid(
                field=f"{field}.gpus", value=gpu, remedy=f"already taken by {owner[gpu]}"
            )
        owner[gpu] = wish.replica_id
