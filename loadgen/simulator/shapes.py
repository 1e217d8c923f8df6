"""Models and GPUs of a topology as live switches see them, by their profiles."""

from collections.abc import Mapping

from shared.cost.library import gpu_facts, load_profile
from shared.cost.links import between, copy_s
from shared.cost.model import named_folder
from shared.cost.profile import ModelFacts
from shared.hardware import GpuSpec
from shared.mesh import MeshConfig
from shared.placement.copies import DISK
from shared.placement.sheets import ModelShape


def model_shapes(mesh: MeshConfig) -> dict[str, ModelShape]:
    """Of the models whose weights can be cut into sheets; none without profiles."""
    if mesh.engine.modelled.timing == "settings":
        return {}
    found: dict[str, ModelShape] = {}
    for model in mesh.models:
        name, folders = named_folder(model.profile_name)
        profile = load_profile(mesh.nodes[0].gpu_kind, name, folders)
        shape = _shape(model.model_id, profile.model_facts)
        if shape is not None:
            found[model.model_id] = shape
    return found


class Copies:
    """How long bytes of a live switch are on their way to the GPUs of a topology. Only those whose
    profiles are known switch live."""

    def __init__(self, mesh: MeshConfig) -> None:
        by_profile = mesh.engine.modelled.timing == "profile"
        self._nodes = {gpu.gpu_id: h.node_id for h in mesh.nodes for gpu in h.gpu_specs()}
        self._facts = {gpu.gpu_id: gpu_facts(gpu.kind) for gpu in mesh.gpus() if by_profile}

    def engine_start_s(self, worker_id: str) -> float:
        return self._facts[worker_id].engine_start_s

    def seconds(self, worker_id: str, byte_counts: Mapping[str, int]) -> float:
        """Bytes by the worker that has them, DISK among them: all come in one after the other."""
        facts, node_id = self._facts[worker_id], self._nodes[worker_id]
        return sum(
            copy_s(
                facts.disk
                if source == DISK
                else between(facts, node_id, self._nodes[source], same_gpu=source == worker_id),
                count,
            )
            for source, count in byte_counts.items()
        )


def with_memory(mesh: MeshConfig, gpu: GpuSpec) -> GpuSpec:
    """The GPU with as much memory as its kind has, where the topology does not say."""
    if gpu.memory_bytes or mesh.engine.modelled.timing == "settings":
        return gpu
    return GpuSpec(gpu_id=gpu.gpu_id, kind=gpu.kind, memory_bytes=gpu_facts(gpu.kind).memory_bytes)


def _shape(model_id: str, facts: ModelFacts) -> ModelShape | None:
    """None for layers that sheets cannot describe: an MLP without a gate, learned positions, or
    weights and KV cache of unlike precision."""
    if not facts.gated or facts.positions or facts.weight_bytes != facts.kv_bytes:
        return None
    return ModelShape(
        model_id=model_id,
        layers=facts.layers,
        hidden=facts.hidden,
        intermediate=facts.ffn,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        vocabulary=facts.vocab,
        item_bytes=facts.weight_bytes,
        tied_embeddings=facts.tied,
    )
