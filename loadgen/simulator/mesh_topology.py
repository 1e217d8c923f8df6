"""The topology of a simulated mesh: hosts and the replicas wished for there, drawn."""

import random

from shared.hardware import Parallelism
from shared.mesh import NodeSpec, ReplicaWish

SHAPES = ("tp1", "tp1", "tp2", "tp1pp2", "tp3")
GPU_BYTES_MIN = 16_200
"""What the whole model weighs, with a KV cache of the usual size."""


def draw_hosts(rng: random.Random) -> tuple[NodeSpec, ...]:
    """Two or three, whose GPUs tell no memory, have plenty, or have little."""
    memory_bytes = rng.choice([0, 2 * GPU_BYTES_MIN, GPU_BYTES_MIN + GPU_BYTES_MIN // 4])
    return tuple(
        NodeSpec(node_id=f"n{i}", gpus=rng.randint(1, 3), gpu_memory_bytes=memory_bytes)
        for i in range(rng.randint(2, 3))
    )


def draw_wishes(
    rng: random.Random, hosts: tuple[NodeSpec, ...], edit: int
) -> tuple[ReplicaWish, ...]:
    """One to four replicas of any shape that fit when every worker is up; some are pinned.
    Most have a name that none had before: one that changes under its old name is reloaded."""
    free = {host.node_id: [gpu.gpu_id for gpu in host.gpu_specs()] for host in hosts}
    wishes: list[ReplicaWish] = []
    for i in range(rng.randint(1, 4)):
        shape = Parallelism.parse(rng.choice(SHAPES) if i else "tp1")  # the first always fits
        roomy = [node_id for node_id, gpus in free.items() if len(gpus) >= shape.gpus]
        if not roomy:
            continue
        gpus = free[rng.choice(roomy)]
        taken = tuple(gpus.pop() for _ in range(shape.gpus))
        pinned = taken if rng.random() < 0.5 else ()  # noqa: PLR2004  # half of them
        named = edit if rng.random() < 0.8 else 0  # noqa: PLR2004  # most of them
        wishes.append(ReplicaWish(replica_id=f"r{i}-{named}", parallelism=str(shape), gpus=pinned))
    return tuple(wishes)
