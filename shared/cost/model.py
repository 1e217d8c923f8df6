"""All that is known of one replica: its profile, GPU, shape, step times, capacity and start."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from shared.cost.library import Folders, gpu_facts, load_profile
from shared.cost.links import start_s
from shared.cost.memory import fits, kv_capacity_tokens, weight_bytes
from shared.cost.profile import GpuFacts, Profile
from shared.cost.stages import stages_of
from shared.cost.step import StepModel, step_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

MODELS_KEPT_MAX = 1024


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """One replica of ``profile``'s model in ``shape`` on ``nodes`` nodes. Equal to itself only, so
    that it can be the key of what is worked out from it."""

    profile: Profile
    gpu: GpuFacts
    shape: Parallelism
    nodes: int
    stages: tuple[int, ...]
    step: StepModel
    kv_tokens: int
    start_s: float


def cost_model(  # noqa: PLR0913  # what makes a replica's times
    gpu_kind: str,
    model_name: str,
    shape: Parallelism,
    *,
    nodes: int = 1,
    stages: Sequence[int] = (),
    speedup: float = 1.0,
    folders: Folders = (),
) -> CostModel:
    """The cost model of a replica, one object for the same question however often it is asked. A
    ``model_name`` with a folder before it (``FOLDER/NAME``) is looked up there first.
    Raises ConfigInvalid for what is unknown, was not measured, or does not fit; ``speedup``
    divides step times only."""
    name, own = named_folder(model_name)
    places = (*own, *(Path(folder) for folder in folders))
    split = tuple(stages)
    return _cached(gpu_kind.lower(), name.lower(), shape, nodes, split, speedup, places)


def named_folder(model_name: str) -> tuple[str, tuple[Path, ...]]:
    """``FOLDER/NAME`` as a profile's name, and the folder to look in first, if there is one."""
    folder, slash, name = model_name.rpartition("/")
    return name, (Path(folder or "/"),) if slash else ()


def replica_model(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    *,
    nodes: int = 1,
    stages: Sequence[int] = (),
    speedup: float = 1.0,
) -> CostModel:
    """As ``cost_model``, of a profile at hand."""
    if not 1 <= nodes <= shape.gpus:
        raise ConfigInvalid(field="nodes", value=nodes, remedy=f"use 1 to {shape.gpus} for {shape}")
    split = stages_of(profile.model_facts, shape, stages)
    step = step_model(profile, gpu, shape, nodes=nodes, stages=split, speedup=speedup)
    if not fits(profile, gpu, shape, split):
        need, have = max(weight_bytes(profile.model_facts, shape, split)), gpu.memory_bytes
        raise ConfigInvalid(
            field="parallelism",
            value=str(shape),
            remedy=f"{profile.model} does not fit {profile.gpu}: {need / 1e9:.1f} GB of weights on "
            f"the fullest GPU of {have / 1e9:.1f} GB leave no room for a KV cache; use more GPUs",
        )
    return CostModel(
        profile=profile,
        gpu=gpu,
        shape=shape,
        nodes=nodes,
        stages=split,
        step=step,
        kv_tokens=kv_capacity_tokens(profile, gpu, shape, split),
        start_s=start_s(profile, gpu, shape, nodes=nodes, stages=split),
    )


@lru_cache(maxsize=MODELS_KEPT_MAX)
def _cached(  # noqa: PLR0913, PLR0917  # the key of the cache
    gpu_kind: str,
    model_name: str,
    shape: Parallelism,
    nodes: int,
    stages: tuple[int, ...],
    speedup: float,
    folders: tuple[Path, ...],
) -> CostModel:
    profile = load_profile(gpu_kind, model_name, folders)
    facts = gpu_facts(gpu_kind, folders)
    return replica_model(profile, facts, shape, nodes=nodes, stages=stages, speedup=speedup)
