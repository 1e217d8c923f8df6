"""A replica's ranks as threads of one process: for tests of what they compute together."""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.follower import TorchFollower
from services.worker.engine.torch_engine.leader import TorchEngine
from services.worker.engine.torch_engine.model_config import read_model_config
from services.worker.engine.torch_engine.rank_part import OpenedModel, RankPart, follow, lead
from services.worker.events import EngineStart
from services.worker.peers.server import PeerServer
from shared.errors import EngineFailed
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import Copy
from shared.placement.sheets import Rank, areas_of, cache_token_bytes

_PATIENCE_S = 20.0
IN_FLIGHT_BYTES = 8 << 20
"""Of tensors between two ranks, beyond which the sender waits."""


class World:
    """What the ranks share. Once ``broken``, whoever waits raises EngineFailed."""

    def __init__(self, shape: Parallelism) -> None:
        self.shape = shape
        self.posts = {
            (source, target): queue.SimpleQueue[Tensor | None]()
            for source in range(shape.gpus)
            for target in range(shape.gpus)
        }
        self.barriers = [threading.Barrier(shape.tp) for _ in range(shape.pp)]
        self.slots: list[dict[tuple[bool, int], Tensor]] = [{} for _ in range(shape.pp)]
        self.commands = [queue.SimpleQueue[bytes | None]() for _ in range(shape.gpus)]
        self.answers = [queue.SimpleQueue[bytes]() for _ in range(shape.gpus)]
        self.in_flight = dict.fromkeys(self.posts, 0)
        self.received = threading.Condition()
        self.broken = False

    def destroy(self) -> None:
        self.broken = True
        with self.received:
            self.received.notify_all()
        for barrier in self.barriers:
            barrier.abort()
        for post in self.posts.values():
            post.put(None)
        for commands in self.commands:
            commands.put(None)


class ThreadGroup:
    """See RankGroup."""

    def __init__(self, world: World, rank: Rank, *, tp: bool) -> None:
        self._world, self._place = world, rank
        self.rank = rank.tp_rank if tp else rank.number
        self.size = rank.tp if tp else rank.tp * rank.pp
        self._odd = False

    @property
    def in_flight_bytes(self) -> int:
        return IN_FLIGHT_BYTES

    def all_reduce(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        parts = self._all(tensor)
        tensor.copy_(torch.stack(parts).sum(dim=0))

    def gather(
        self, tensor: Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor] | None:
        parts = self._all(tensor)
        assert shapes is None or [tuple(p.shape) for p in parts] == [tuple(s) for s in shapes]
        return parts if self.rank == to else None

    def send(self, tensor: Tensor, to: int) -> None:
        assert tensor.is_contiguous()
        world, way = self._world, (self.rank, to)
        with world.received:
            world.in_flight[way] += tensor.nbytes
            world.posts[way].put(tensor.clone())
            if not world.received.wait_for(
                lambda: world.broken or world.in_flight[way] <= IN_FLIGHT_BYTES, _PATIENCE_S
            ):
                raise EngineFailed(f"nobody receives what {self.rank} sends to {to}")

    def recv(self, tensor: Tensor, source: int) -> None:
        found = self._world.posts[source, self.rank].get(timeout=_PATIENCE_S)
        if found is None or self._world.broken:
            raise EngineFailed("another rank failed")
        assert found.shape == tensor.shape
        assert found.dtype == tensor.dtype
        tensor.copy_(found)
        with self._world.received:
            self._world.in_flight[source, self.rank] -= tensor.nbytes
            self._world.received.notify_all()

    def close(self) -> None:
        pass

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in order of rank."""
        barrier, slots = (
            self._world.barriers[self._place.pp_rank],
            self._world.slots[self._place.pp_rank],
        )
        # Slots take turns: who has come to this barrier has read what lay in the other ones.
        self._odd = not self._odd
        slots[self._odd, self._place.tp_rank] = tensor.clone()
        try:
            barrier.wait(_PATIENCE_S)
            parts = [slots[self._odd, number] for number in range(self._place.tp)]
        except threading.BrokenBarrierError:
            raise EngineFailed("another rank failed") from None
        return parts


@dataclass(frozen=True, slots=True)
class ThreadGroups:
    tp: ThreadGroup
    pipe: ThreadGroup


@dataclass(slots=True)
class ThreadLink:
    """See LeaderLink; ``plan_bytes`` are the lengths of what was broadcast, ``told`` how often it
    heard of progress while it was ``working``."""

    world: World
    working: bool = False
    told: int = 0
    plan_bytes: list[int] = field(default_factory=list[int])

    def progress(self) -> None:
        self.told += self.working

    def busy(self, busy: bool) -> None:
        self.working = busy

    def broadcast(self, payload: bytes) -> None:
        self.plan_bytes.append(len(payload))
        for commands in self.world.commands[1:]:
            commands.put(payload)

    def recv(self, rank: int, timeout_s: float) -> bytes:
        return self.world.answers[rank].get(timeout=_PATIENCE_S)


class ThreadFollowerLink:
    """See FollowerLink."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def progress(self) -> None:
        pass

    def busy(self, busy: bool) -> None:
        pass

    def recv(self) -> bytes | None:
        return self.world.commands[self.rank].get()

    def send(self, payload: bytes) -> None:
        self.world.answers[self.rank].put(payload)

    def close(self) -> None:
        self.world.commands[self.rank].put(None)


class ThreadReplica:
    """A replica of ``shape``; ``close`` the engine, and all its threads end. With a ``name`` each
    rank is a worker that peers reach, and ``replica_id`` is theirs to take requests from.
    ``cache_blocks``: of KV cache that there is room for until it grows."""

    def __init__(
        self,
        folder: Path,
        shape: str,
        config: TorchEngineConfig,
        *,
        name: str = "",
        replica_id: str = "r",
        cache_blocks: int = 0,
    ) -> None:
        self.cache_blocks = cache_blocks
        self.world = World(Parallelism.parse(shape))
        self.followers: dict[int, TorchFollower] = {}
        self.failures: list[EngineFailed] = []
        self.link = ThreadLink(self.world)
        gpus = tuple(f"{name}g{number}" for number in range(self.world.shape.gpus))
        self.spec = ReplicaSpec(replica_id=replica_id, model_id="m", parallelism=shape, gpus=gpus)
        self.servers = [PeerServer(worker_id=gpu) for gpu in gpus] if name else []
        self.peers = {gpu: server.address for gpu, server in zip(gpus, self.servers, strict=False)}
        self._ready = queue.SimpleQueue[int]()
        self._folder, self._config = folder, config
        self.threads = [
            threading.Thread(target=self._follow, args=(number,), daemon=True)
            for number in range(1, self.world.shape.gpus)
        ]
        for thread in self.threads:
            thread.start()
        part = self._part(0)
        part.undo.callback(self.join)
        self.engine: TorchEngine = lead(part, self.link if self.threads else None)
        for _ in self.threads:
            self._ready.get(timeout=_PATIENCE_S)

    def expect_from(self, other: "ThreadReplica") -> None:
        """Requests will be taken over from ``other``."""
        model = read_model_config(self._folder).shape("m", self._config.dtype)
        theirs = [Rank.of(n, other.world.shape) for n in range(other.world.shape.gpus)]
        for number in range(self.world.shape.gpus):
            wanted = areas_of(model, Rank.of(number, self.world.shape))["cache"]
            copies: list[Copy] = []
            for rank in theirs:
                area = areas_of(model, rank)["cache"].meet(wanted)
                if area is not None and all(copy.area != area for copy in copies):
                    source = other.spec.gpus[rank.number]
                    copies.append(Copy("cache", area, source, other.spec.replica_id))
            taker = self.followers.get(number, self.engine)
            taker.expect(copies, other.peers, verify=True)

    def join(self) -> None:
        """End the followers; each must have come to its end by itself."""
        for commands in self.world.commands:
            commands.put(None)
        for thread in self.threads:
            thread.join(_PATIENCE_S)
            assert not thread.is_alive(), "a follower does not end"

    def _part(self, number: int) -> RankPart:
        rank = Rank.of(number, self.world.shape)
        start = EngineStart(
            spec=self.spec,
            generation=1,
            rank=number,
            peers=self.peers,
            cache_bytes_max=self.cache_blocks * self._block_bytes(rank),
        )
        server = self.servers[number] if self.servers else None
        part = RankPart(OpenedModel.open(self._folder, self._config), start, server)
        if server is not None:
            part.undo.callback(server.close)
        groups = ThreadGroups(
            ThreadGroup(self.world, rank, tp=True), ThreadGroup(self.world, rank, tp=False)
        )
        if number == 0:
            part.connect(self.link, groups)
        else:
            part.connect(ThreadFollowerLink(self.world, number), groups)
        return part

    def _block_bytes(self, rank: Rank) -> int:
        shape = read_model_config(self._folder).shape("m", self._config.dtype)
        return self._config.block_tokens * cache_token_bytes(shape, rank)

    def _follow(self, number: int) -> None:
        part = self._part(number)
        follower = follow(part, ThreadFollowerLink(self.world, number))
        self.followers[number] = follower
        self._ready.put(number)
        try:
            follower.serve()
        except EngineFailed as error:
            self.failures.append(error)
            self.world.destroy()
        finally:
            follower.close()
