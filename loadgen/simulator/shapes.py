"""Models and GPUs of a topology as live switches see them, by their profiles."""

from services.switcher.transfer.problem import Links
from shared.cost.library import gpu_facts, load_profile
from shared.cost.model import named_folder
from shared.cost.profile import ModelFacts
from shared.hardware import GpuSpec
from shared.mesh import MeshConfig
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


def links_of(mesh: MeshConfig) -> Links:
    """Those of the kind of GPU whose links are slowest."""
    if mesh.engine.modelled.timing == "settings":
        return Links.cpu()
    kinds = sorted({node.gpu_kind for node in mesh.nodes})
    return min((Links.of(gpu_facts(kind)) for kind in kinds), key=lambda links: links.peer)


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
