"""What a modelled replica would have to move in a switch, and how long that would take."""

import msgspec

from services.worker.engine.modelled_timing import modelled_replica
from services.worker.events import EngineStart
from shared.cost.library import load_profile
from shared.cost.links import between, copy_s
from shared.cost.model import named_folder
from shared.cost.topology import replica_cost
from shared.mesh import MeshConfig
from shared.models import ModelSpec
from shared.placement.copies import DISK
from shared.placement.sheets import ModelShape, sheets_of

STAND_IN = ModelShape(
    model_id="",
    layers=32,
    hidden=1024,
    intermediate=4096,
    heads=64,
    kv_heads=8,
    head_dim=16,
    vocabulary=32_000,
    item_bytes=2,
)
"""Of models without a profile: 1.1 GB that can be cut into 64 ranks and 32 stages. Its copies
take no time, as nothing is known of links."""


def modelled_shapes(mesh: MeshConfig) -> dict[str, ModelShape]:
    """By model: the dimensions that its profile gives, or those of a stand-in."""
    return {model.model_id: _shape(mesh, model) for model in mesh.models}


def modelled_start_s(mesh: MeshConfig, start: EngineStart, shape: ModelShape) -> float:
    """From disk, as the cost model has it; beside what runs, for as long as the copies take: those
    of one link follow each other, links work side by side. The engine's own start is left out
    there: it is under way before the first byte comes."""
    if not start.copies or all(copy.source == DISK for copy in start.copies):
        return modelled_replica(mesh, start.spec).start_s
    if mesh.engine.modelled.timing == "settings":
        return 0.0
    sheets = sheets_of(shape)
    by_source: dict[str, int] = {}
    for copy in start.copies:
        count = copy.area.cells * sheets[copy.sheet].cell_bytes
        by_source[copy.source] = by_source.get(copy.source, 0) + count
    me = start.spec.gpus[start.rank]
    node = mesh.node_of(me)
    facts = replica_cost(mesh, start.spec).gpu

    def seconds(source: str, count: int) -> float:
        if source == DISK:
            return copy_s(facts.disk, count)
        link = between(facts, mesh.node_of(source), node, same_gpu=source == me)
        return copy_s(link, count)

    slowest_s = max(seconds(source, count) for source, count in by_source.items())
    return slowest_s / mesh.engine.modelled.speedup


def _shape(mesh: MeshConfig, model: ModelSpec) -> ModelShape:
    if mesh.engine.modelled.timing == "settings":
        return msgspec.structs.replace(STAND_IN, model_id=model.model_id)
    name, folders = named_folder(model.profile_name)
    facts = load_profile(mesh.nodes[0].gpu_kind, name, folders).model_facts
    return ModelShape(
        model_id=model.model_id,
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
