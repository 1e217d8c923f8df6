"""Time of bytes on their way: between GPUs, to the host, over the network, from disk."""

from collections.abc import Sequence

from shared.cost.memory import weight_bytes
from shared.cost.profile import GpuFacts, Link, Profile
from shared.cost.stages import stages_of
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism


def copy_s(link: Link, byte_count: float) -> float:
    """One copy, alone on its link: latency, then bytes at the link's rate. Nothing takes none."""
    if byte_count <= 0:
        return 0.0
    return link.latency_s + byte_count / link.bytes_per_s


def between(gpu: GpuFacts, node_a: object, node_b: object, *, same_gpu: bool = False) -> Link:
    """The link from a GPU of one node to a GPU of another, or of the same; nodes by any name."""
    if same_gpu:
        return gpu.local
    return gpu.peer if node_a == node_b else gpu.network


def reload_s(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    *,
    nodes: int = 1,
    stages: Sequence[int] = (),
) -> float:
    """Loading the weights of a replica from its nodes' disks. Each GPU reads its shard only, the
    GPUs of a node share its disk, and the node with most to read is the last to be ready. Ranks
    fill one node after the other, stage by stage."""
    if not 1 <= nodes <= shape.gpus:
        raise ConfigInvalid(field="nodes", value=nodes, remedy=f"use 1 to {shape.gpus} for {shape}")
    facts = profile.model_facts
    split = stages_of(facts, shape, stages)
    shards = [b for b in weight_bytes(facts, shape, split) for _ in range(shape.tp)]
    per_node = -(-len(shards) // nodes)
    busiest = max(sum(shards[i : i + per_node]) for i in range(0, len(shards), per_node))
    return copy_s(gpu.disk, busiest)


def start_s(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    *,
    nodes: int = 1,
    stages: Sequence[int] = (),
) -> float:
    """From nothing to serving: the engine's own start, then its weights."""
    return gpu.engine_start_s + reload_s(profile, gpu, shape, nodes=nodes, stages=stages)
