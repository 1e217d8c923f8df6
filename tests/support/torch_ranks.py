"""Ranks of made-up models in one process, each a worker of its own, and a trivial planner."""

import contextlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.kv_transfer import KvTransfer
from services.worker.engine.torch_engine.model_config import ModelConfig, RopeConfig
from services.worker.engine.torch_engine.sharding import TensorShard, kv_shards, weight_shards
from services.worker.engine.torch_engine.transfer import adopting, check_covered, fetch_weights
from services.worker.engine.torch_engine.weights import StageWeights, allocate_weights
from services.worker.peers.address import PeerAddress
from services.worker.peers.server import PeerServer
from shared.hardware import Parallelism
from shared.placement.copies import Copy
from shared.placement.sheets import Area, Rank, SheetName, areas_of

CPU = torch.device("cpu")


def mapped_bytes(name: str) -> int:
    """Of this process's mappings of memory segments called so: what is resident."""
    total, ours = 0, False
    with Path("/proc/self/smaps").open(encoding="utf-8") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                ours = name in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def small_model(**changes: object) -> ModelConfig:
    """A decoder of the usual kind."""
    facts = ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary=50,
        hidden=16,
        intermediate=22,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=4,
        norm_epsilon=1e-6,
        context_tokens=64,
        rope=RopeConfig(),
        tied_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="float32",
    )
    return msgspec.structs.replace(facts, **changes)


def foreign(address: str) -> str:
    """The same worker, as one on another host is told of it: only TCP leads there."""
    there = PeerAddress.decode(address)
    return msgspec.structs.replace(there, host_id="another-host").encode()


class Workers:
    """Peer servers by worker_id, started when first asked for; closed after what ``at_end`` has."""

    def __init__(self) -> None:
        self.at_end = contextlib.ExitStack()
        self.servers: dict[str, PeerServer] = {}

    def __getitem__(self, worker_id: str) -> PeerServer:
        if worker_id not in self.servers:
            self.servers[worker_id] = PeerServer(worker_id=worker_id)
        return self.servers[worker_id]

    def peers(self, worker_ids: Iterable[str], *, remote: bool = False) -> dict[str, str]:
        addresses = {worker_id: self[worker_id].address for worker_id in worker_ids}
        if remote:
            return {worker_id: foreign(address) for worker_id, address in addresses.items()}
        return addresses

    def close(self) -> None:
        self.at_end.close()
        for server in self.servers.values():
            server.close()


@dataclass(frozen=True)
class Placed:
    """A replica on workers, rank by rank."""

    replica_id: str
    shape: Parallelism
    workers: Sequence[str]

    def ranks(self) -> list[tuple[str, Rank]]:
        return [
            (worker_id, Rank.of(number, self.shape))
            for number, worker_id in enumerate(self.workers)
        ]


@dataclass
class Held:
    """What one rank holds, with its memory."""

    worker_id: str
    arena: Arena
    weights: StageWeights
    cache_shards: list[TensorShard]
    cache: dict[str, Tensor]
    exports: Exports | None = None
    fetched: dict[str, int] = field(default_factory=dict[str, int])

    def close(self) -> None:
        if self.exports is not None:
            self.exports.close()
        self.arena.close()


def noise(shards: Iterable[TensorShard], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Full tensors, no two elements of which are alike by system."""
    generator = torch.Generator().manual_seed(seed)
    return {
        shard.name: torch.randn(shard.full_shape, generator=generator).to(dtype) for shard in shards
    }


def hold(
    model: ModelConfig,
    rank: Rank,
    full: dict[str, Tensor],
    *,
    server: PeerServer,
    replica_id: str,
    worker_id: str,
    blocks: int,
    dtype: torch.dtype = torch.float32,
) -> Held:
    """A rank of an old replica: filled with its slices of ``full``, and offered."""
    arena = Arena(replica_id)
    weights = allocate_weights(model, rank, dtype=dtype, device=CPU, allocate=arena.allocate)
    shards = kv_shards(model, rank, blocks=blocks, block_tokens=4)
    cache = {shard.name: arena.allocate(shard.shape, dtype, CPU, shard.name) for shard in shards}
    held = Held(worker_id, arena, weights, shards, cache)
    for shard in (*weights.shards, *shards):
        (weights.named | cache)[shard.name].copy_(full[shard.name][shard.index])
    held.exports = Exports(server, arena, replica_id=replica_id)
    held.exports.add(weights.shards, weights.named)
    held.exports.add(shards, cache)
    return held


def arrive(
    model: ModelConfig,
    rank: Rank,
    copies: Sequence[Copy],
    peers: dict[str, str],
    *,
    worker_id: str,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    verify: bool = False,
) -> Held:
    """A rank of a new replica: its weights fetched, its cache empty."""
    arena = Arena("new")
    shards = weight_shards(model, rank)
    weight_copies = [copy for copy in copies if copy.sheet != "cache"]
    check_covered(shards, weight_copies)
    allocate = adopting(arena, shards, weight_copies, peers, worker_id=worker_id)
    weights = allocate_weights(model, rank, dtype=dtype, device=CPU, allocate=allocate)
    fetched = fetch_weights(
        weights, weight_copies, peers, worker_id=worker_id, stage=0, verify=verify
    )
    cache_shards = kv_shards(model, rank, blocks=blocks, block_tokens=4)
    cache = {
        shard.name: arena.allocate(shard.shape, dtype, CPU, shard.name) for shard in cache_shards
    }
    return Held(worker_id, arena, weights, cache_shards, cache, fetched=fetched)


def receiver(
    held: Held, copies: Sequence[Copy], peers: dict[str, str], *, verify: bool = False
) -> KvTransfer:
    """What pulls KV cache into ``held``."""
    kv = KvTransfer(held.cache_shards, held.cache, worker_id=held.worker_id)
    kv.expect(copies, peers, verify=verify)
    return kv


def plan(model: ModelConfig, old: Sequence[Placed], rank: Rank, draw: random.Random) -> list[Copy]:
    """Copies for one rank of a new replica: each cell from any that holds it; of the cache, from
    each old replica."""
    shape = model.shape("model", "float32")
    copies: list[Copy] = []
    for sheet, area in areas_of(shape, rank).items():
        for group in [[one] for one in old] if sheet == "cache" else [old]:
            holders = [
                (replica.replica_id, worker_id, held[sheet])
                for replica in group
                for worker_id, other in replica.ranks()
                if sheet in (held := areas_of(shape, other))
            ]
            copies += _cells(sheet, area, holders, draw)
    return copies


def _cells(
    sheet: SheetName,
    area: Area,
    holders: Sequence[tuple[str, str, Area]],
    draw: random.Random,
) -> list[Copy]:
    edges = {area.units[0], area.units[1]}
    edges |= {edge for _, _, other in holders for edge in other.units}
    cuts = sorted(edge for edge in edges if area.units[0] <= edge <= area.units[1])
    copies: list[Copy] = []
    for layer in range(*area.layers):
        for units in itertools.pairwise(cuts):
            cell = Area((layer, layer + 1), units)
            fitting = [(r, w) for r, w, other in holders if _inside(cell, other)]
            replica_id, worker_id = draw.choice(fitting)
            copies.append(Copy(sheet, cell, worker_id, replica_id))
    return copies


def _inside(cell: Area, other: Area) -> bool:
    return cell.meet(other) == cell
