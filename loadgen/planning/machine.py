"""The machines that a plan is made for: a topology, and what it would be with other hardware."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.compare.asked import with_models
from services.scheduler.config import SchedulerConfig
from shared.config import load_settings
from shared.cost.files import write_gpu, write_profile
from shared.cost.library import gpu_facts, load_profile
from shared.cost.model import named_folder
from shared.cost.profile import GpuFacts, Link
from shared.cost.topology import check_profiles
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig, NodeSpec

GPUS_MAX = 4096
GBPS = 1e9 / 8  # bytes/s in a Gbit/s
POLICY = "oserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a plan is for, and what the scheduler is told to heed."""

    mesh: MeshConfig
    scheduler: SchedulerConfig

    @property
    def gpus(self) -> int:
        return len(self.mesh.gpus())

    def brief(self) -> str:
        """``16 x h100 on 2 nodes``."""
        counts: dict[str, list[int]] = {}
        for node in self.mesh.nodes:
            counts.setdefault(node.gpu_kind, []).append(node.gpus)
        return " and ".join(
            f"{sum(sizes)} x {kind} on {len(sizes)} node{'s' if len(sizes) > 1 else ''}"
            for kind, sizes in sorted(counts.items())
        )


def read_site(topology: Path, *, sets: Sequence[str]) -> Site:
    """The topology's mesh and scheduler settings, ``sets`` on top. The environment is left out, so
    that a plan can be made again. Raises ConfigInvalid."""
    settings = load_settings(file=str(topology), environ={}, sets=sets)
    if settings.sources.get("scheduler.policy") == "--set":
        raise ConfigInvalid(
            field="scheduler.policy",
            value=settings.values["scheduler"]["policy"],
            remedy=f"plans are made by {POLICY}; `oserve compare --policies` compares others",
        )
    mesh = settings.section("mesh", MeshConfig).checked()
    if not mesh.nodes:
        raise ConfigInvalid(
            field="mesh.nodes", value=(), remedy="name at least one node with one GPU"
        )
    scheduler = msgspec.structs.replace(
        settings.section("scheduler", SchedulerConfig), policy=POLICY
    ).checked()
    return Site(mesh=mesh, scheduler=scheduler)


def serving(site: Site, models: Sequence[str], *, alone: bool) -> Site:
    """The site with the models that are asked for. The topology's others go on being served, unless
    ``alone``, or unless one is asked for that the topology lacks. Raises ConfigInvalid for models
    or GPUs without a cost profile, and for settings of models that are not served."""
    own = site.mesh.model_ids
    if alone or not set(models) <= set(own):
        own = ()
    mesh = with_models(site.mesh, list(dict.fromkeys((*own, *models))))
    check_profiles(msgspec.structs.replace(mesh, replicas=()))
    return Site(mesh=mesh, scheduler=site.scheduler.checked_for(mesh.model_ids))


def with_gpus(mesh: MeshConfig, gpus: int, *, kind: str = "") -> MeshConfig:
    """The mesh with ``gpus`` GPUs of ``kind`` altogether, its own kind if that is "": on its nodes
    in their order, the last one partly, and on more like the first. Raises ConfigInvalid."""
    whose = kind or _only_kind(mesh, gpus)
    _check_count(gpus)
    nodes: list[NodeSpec] = []
    left = gpus
    for node in mesh.nodes:
        if left > 0:
            nodes.append(msgspec.structs.replace(node, gpus=min(left, node.gpus)))
            left -= nodes[-1].gpus
    grown = msgspec.structs.replace(mesh, nodes=tuple(nodes), replicas=())
    grown = _of_kind(grown, kind) if kind else grown
    return plus_gpus(grown, left, kind=whose) if left > 0 else grown


def plus_gpus(mesh: MeshConfig, gpus: int, *, kind: str = "") -> MeshConfig:
    """The mesh with ``gpus`` more of ``kind``, or of its own: in places that nodes of the kind have
    left, then in nodes of their own. Raises ConfigInvalid for an unknown kind or too many."""
    kind = kind or _only_kind(mesh, gpus)
    _check_count(gpus + len(mesh.gpus()))
    size = max((n.gpus for n in mesh.nodes if n.gpu_kind == kind), default=0)
    size = max(size, gpu_facts(kind).gpus_per_node)
    nodes: list[NodeSpec] = []
    left = gpus
    for node in mesh.nodes:
        more = min(left, size - node.gpus) if node.gpu_kind == kind else 0
        nodes.append(msgspec.structs.replace(node, gpus=node.gpus + more))
        left -= more
    taken = {node.node_id for node in nodes}
    while left > 0:
        node_id = next(name for n in range(2 * GPUS_MAX) if (name := f"n{n}") not in taken)
        taken.add(node_id)
        nodes.append(_node(node_id, min(left, size), kind))
        left -= nodes[-1].gpus
    return msgspec.structs.replace(mesh, nodes=tuple(nodes), replicas=()).checked()


def on_nodes(mesh: MeshConfig, count: int) -> MeshConfig:
    """The mesh with its GPUs, all of one kind, spread over ``count`` nodes as evenly as they go.
    Raises ConfigInvalid."""
    kinds = sorted({node.gpu_kind for node in mesh.nodes})
    gpus = len(mesh.gpus())
    if len(kinds) > 1:
        remedy = f"the GPUs are {' and '.join(kinds)}: only alike ones can be spread"
        raise ConfigInvalid(field="nodes", value=count, remedy=remedy)
    if not 1 <= count <= gpus:
        raise ConfigInvalid(field="nodes", value=count, remedy=f"use 1 to {gpus}, one GPU each")
    each, odd = divmod(gpus, count)
    nodes = tuple(_node(f"n{n}", each + (n < odd), kinds[0]) for n in range(count))
    return msgspec.structs.replace(mesh, nodes=nodes, replicas=()).checked()


def with_network(mesh: MeshConfig, folder: Path, bytes_per_s: float | None) -> MeshConfig:
    """The mesh with a network of ``bytes_per_s`` between its nodes; None: as fast as the links
    inside a node. The changed profiles are written to ``folder``, where the cost model finds them
    for as long as it is there."""
    for kind in sorted({node.gpu_kind.lower() for node in mesh.nodes}):
        facts: GpuFacts | None = None
        for model in mesh.models:
            name, own = named_folder(model.profile_name)
            facts = gpu_facts(kind, own)
            profile = load_profile(kind, name, own)
            write_profile(folder / kind / f"{name.lower()}.toml", profile)
        assert facts is not None, "a mesh has a model"
        link = facts.peer
        if bytes_per_s is not None:
            link = Link(bytes_per_s=bytes_per_s, latency_s=facts.network.latency_s)
        write_gpu(folder / kind / "gpu.toml", msgspec.structs.replace(facts, network=link))
    specs = [
        msgspec.structs.replace(
            model, profile=f"{folder}/{named_folder(model.profile_name)[0].lower()}"
        )
        for model in mesh.models
    ]
    return msgspec.structs.replace(mesh, model=specs[0], more_models=tuple(specs[1:]))


def price_per_hour(site: Site, gpus: Iterable[str]) -> float:
    """Of these GPUs: as the scheduler's settings say, else as the GPUs' facts do, in US$."""
    kinds = {gpu.gpu_id: gpu.kind for gpu in site.mesh.gpus()}
    prices = site.scheduler.gpu_prices or {}
    total = 0.0
    for gpu in gpus:
        price = prices.get(kinds[gpu])
        total += gpu_facts(kinds[gpu]).price_per_hour if price is None else price
    return total


def _of_kind(mesh: MeshConfig, kind: str) -> MeshConfig:
    nodes = tuple(_node(node.node_id, node.gpus, kind) for node in mesh.nodes)
    return msgspec.structs.replace(mesh, nodes=nodes)


def _node(node_id: str, gpus: int, kind: str) -> NodeSpec:
    memory = gpu_facts(kind).memory_bytes
    return NodeSpec(node_id=node_id, gpus=gpus, gpu_kind=kind, gpu_memory_bytes=memory)


def _only_kind(mesh: MeshConfig, gpus: int) -> str:
    kinds = sorted({node.gpu_kind for node in mesh.nodes})
    if len(kinds) > 1:
        remedy = f"the GPUs are {' and '.join(kinds)}: say which kind, as in kind={kinds[0]}"
        raise ConfigInvalid(field="gpus", value=gpus, remedy=remedy)
    return kinds[0]


def _check_count(gpus: int) -> None:
    if not 1 <= gpus <= GPUS_MAX:
        raise ConfigInvalid(field="gpus", value=gpus, remedy=f"use 1 to {GPUS_MAX} GPUs")
