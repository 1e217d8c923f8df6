"""Cost models of a topology's replicas, with errors that name the topology's fields."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from shared.cost.files import ProfileInvalid
from shared.cost.library import gpu_facts, load_profile
from shared.cost.model import CostModel, cost_model, named_folder
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig, NodeSpec, ReplicaWish
from shared.messages.plans import ReplicaSpec


def replica_cost(mesh: MeshConfig, spec: ReplicaSpec) -> CostModel:
    """What the profile of the replica's model says of its shape on its GPUs. Step times are
    divided by the modelled engine's ``speedup``.

    Raises ConfigInvalid for GPUs of several kinds, and for what has no profile or does not fit.
    """
    nodes = _nodes_of(mesh, spec.gpus)
    kinds = sorted({node.gpu_kind.lower() for node in nodes})
    if len(kinds) != 1:
        raise ConfigInvalid(
            field=f"mesh.replicas.{spec.replica_id}.gpus",
            value=spec.gpus,
            remedy=f"a profile is of one kind of GPU, these are {' and '.join(kinds) or 'none'}",
        )
    shape = Parallelism.parse(spec.parallelism)
    return _cost(mesh, nodes[0], spec.model_id, shape, replica_id=spec.replica_id, spans=len(nodes))


def check_profiles(mesh: MeshConfig) -> None:
    """Raises ConfigInvalid unless each model has a profile on each kind of GPU, and each replica
    asked for one that holds its shape and leaves it room for a KV cache."""
    if not mesh.nodes:
        remedy = 'timing = "profile" needs GPUs to look up: add [[mesh.nodes]]'
        raise ConfigInvalid(field="mesh.nodes", value=(), remedy=remedy)
    by_kind: dict[str, NodeSpec] = {}
    for node in mesh.nodes:
        by_kind.setdefault(node.gpu_kind.lower(), node)
    for wish in mesh.replicas:
        _check_wish(mesh, wish, list(by_kind.values()))
    for node in by_kind.values():
        for model_id in mesh.model_ids:
            _known(mesh, node, model_id)


def _check_wish(mesh: MeshConfig, wish: ReplicaWish, by_kind: Sequence[NodeSpec]) -> None:
    model_id = mesh.model_of(wish.model_id).model_id
    if wish.gpus:
        replica_cost(
            mesh,
            ReplicaSpec(
                replica_id=wish.replica_id,
                model_id=model_id,
                parallelism=wish.parallelism,
                gpus=wish.gpus,
            ),
        )
        return
    shape = Parallelism.parse(wish.parallelism)
    refused: ConfigInvalid | None = None
    for node in by_kind:  # the scheduler places it: one kind that can hold it is enough
        try:
            _cost(mesh, node, model_id, shape, replica_id=wish.replica_id)
        except ConfigInvalid as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused


def _nodes_of(mesh: MeshConfig, gpus: Sequence[str]) -> list[NodeSpec]:
    """The nodes of these GPUs, that of the first one first."""
    by_id = {node.node_id: node for node in mesh.nodes}
    return [by_id[node_id] for node_id in dict.fromkeys(map(mesh.node_of, gpus))]


def _known(mesh: MeshConfig, node: NodeSpec, model_id: str) -> None:
    """Raises ConfigInvalid, naming node or model, if there is no profile for the two."""
    with _fields_named(mesh, node, model_id):
        name, folders = named_folder(mesh.model_of(model_id).profile_name)
        gpu_facts(node.gpu_kind, folders)
        load_profile(node.gpu_kind, name, folders)


def _cost(  # what makes a replica's cost
    mesh: MeshConfig,
    node: NodeSpec,
    model_id: str,
    shape: Parallelism,
    *,
    replica_id: str,
    spans: int = 1,
) -> CostModel:
    model, speedup = mesh.model_of(model_id), mesh.engine.modelled.speedup
    with _fields_named(mesh, node, model_id, replica_id=replica_id):
        return cost_model(node.gpu_kind, model.profile_name, shape, nodes=spans, speedup=speedup)


@contextmanager
def _fields_named(
    mesh: MeshConfig, node: NodeSpec, model_id: str, *, replica_id: str = ""
) -> Generator[None]:
    """Errors of the cost model, told in the topology's terms."""
    fields = {
        "gpu": f"mesh.nodes.{node.node_id}.gpu_kind",
        "model": f"{mesh.section_of(model_id)}.profile",
        "parallelism": f"mesh.replicas.{replica_id}.parallelism",
    }
    try:
        yield
    except ProfileInvalid:
        raise  # names its own file, line and field
    except ConfigInvalid as error:
        field = fields.get(error.field, error.field)
        raise ConfigInvalid(field=field, value=error.value, remedy=error.remedy) from None
