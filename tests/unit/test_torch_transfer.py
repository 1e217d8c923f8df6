"""Weights between ranks: memory that goes when it should, what is shared, what stops a copy."""

import gc
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena, group_of
from services.worker.engine.torch_engine.exports import (
    Answer,
    Exports,
    TensorEntry,
    TensorTable,
)
from services.worker.engine.torch_engine.loading import Origin, WeightLoader
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.pieces import Piece
from services.worker.engine.torch_engine.sharding import kv_shards, weight_shards
from services.worker.engine.torch_engine.shared_memory import MemorySegment
from services.worker.engine.torch_engine.source import Between, Source
from services.worker.engine.torch_engine.stages import StageOrder, WeightStages
from services.worker.engine.torch_engine.transfer import (
    check_covered,
    connect_source,
    disk_parts,
    fetch_weights,
    free_layers,
    within,
)
from services.worker.engine.torch_engine.weights import allocate_weights
from services.worker.peers.link import PeerLink
from shared.errors import EngineFailed, PeerLost
from shared.hardware import Parallelism
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import Area, Rank, areas_of
from tests.support.torch_ranks import (
    CPU,
    Held,
    Placed,
    Workers,
    arrive,
    hold,
    mapped_bytes,
    noise,
    plan,
    small_model,
)

pytestmark = pytest.mark.torch

_MIB = 2**20
_BLOCKS = 4


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


def fill(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(1)


def descriptors() -> int:
    """Open in this process, the one that counts included."""
    return len(list(Path("/proc/self/fd").iterdir()))


def held_whole(workers: Workers, model: ModelConfig, replica_id: str, worker_id: str) -> Held:
    full = noise(weight_shards(model, Rank()), torch.float32, 1)
    full |= noise(kv_shards(model, Rank(), blocks=_BLOCKS, block_tokens=4), torch.float32, 2)
    return hold(
        model, Rank(), full, server=workers[worker_id],
        replica_id=replica_id, worker_id=worker_id, blocks=_BLOCKS,
    )  # fmt: skip


def all_from(source: str, model: ModelConfig, rank: Rank, replica_id: str = "old") -> list[Copy]:
    areas = areas_of(model.shape("model", "float32"), rank)
    return [Copy(sheet, area, source, replica_id) for sheet, area in areas.items()]


def test_memory_is_committed_by_the_first_write_and_goes_layer_by_layer() -> None:
    """A staged switch counts on it: what a layer has freed is what the next one may take."""
    arena = Arena("layers-test")
    tensors = [
        arena.allocate((_MIB,), torch.uint8, CPU, f"model.layers.{layer}.mlp.down_proj.weight")
        for layer in range(3)
    ]
    cache = arena.allocate((_MIB,), torch.uint8, CPU, "kv.layers.1.key")
    assert arena.committed_bytes == 0
    assert not tensors[0].any(), "fresh memory is not zero"
    fill([*tensors, cache])
    assert arena.committed_bytes == arena.allocated_bytes == 4 * _MIB
    assert mapped_bytes("layers-test") == 4 * _MIB
    tensors[1] = tensors[0]
    arena.free_layer(1)
    assert arena.committed_bytes == mapped_bytes("layers-test") == 3 * _MIB
    assert cache.all(), "a layer's KV cache went with its weights"
    tensors.clear()
    del cache
    arena.close()
    assert mapped_bytes("layers-test") == 0
    assert arena.allocated_bytes == arena.committed_bytes == 0


def test_memory_that_others_map_cannot_be_cut_off() -> None:
    """Whoever reads a page that has gone is killed."""
    segment = MemorySegment.create("kept")
    segment.extend(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 4096)
    assert segment.extend(10) == 8192


def test_closing_frees_descriptors() -> None:
    """Two hundred switches would else use up all that a process may have open."""
    before = descriptors()
    arena = Arena("descriptors")
    tensors = [arena.allocate((8,), torch.float32, CPU, f"kv.layers.{n}.key") for n in range(9)]
    assert descriptors() == before + 9
    tensors.clear()
    arena.close()
    assert descriptors() == before


def test_layers_are_groups_by_name() -> None:
    """Weights and KV cache of a layer must not lie in one segment: they go at different times."""
    assert group_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert group_of("kv.layers.12.key") == "kv.layers.12"
    assert group_of("lm_head.weight") == "lm_head.weight"


def test_unchanged_layers_are_shared_and_outlive_the_old_replica(workers: Workers) -> None:
    """tp1 to pp2 keeps a worker's first layers: copying them would double their memory."""
    model = small_model(layers=4, hidden=64, intermediate=256)
    old = held_whole(workers, model, "shared", "a")
    rank = Rank(pp=2)
    copies = all_from("a", model, rank, "shared")
    new = arrive(model, rank, copies, workers.peers("a"), worker_id="a", blocks=_BLOCKS)
    shared = new.weights.named["model.layers.0.mlp.down_proj.weight"]
    assert shared.data_ptr() == old.weights.named[_DOWN].data_ptr(), "it was copied"
    assert new.fetched == {"a": sum(t.nbytes for t in new.weights.named.values())}
    wanted = {name: tensor.clone() for name, tensor in new.weights.named.items()}
    last = old.weights.named["model.layers.3.mlp.down_proj.weight"].clone()
    free_layers(old.weights, old.arena, old.exports, (0, 4))
    old.close()
    del old
    for name, tensor in wanted.items():
        assert torch.equal(new.weights.named[name], tensor), name
    assert last.any()
    assert mapped_bytes("shared-model.layers.3") == 0, (
        "an old layer that nobody needs is still there"
    )
    assert mapped_bytes("shared-model.layers.0") > 0
    new.exports = Exports(workers["a"], new.arena, replica_id="heir")
    new.exports.add(new.weights.shards, new.weights.named)
    copies = all_from("a", model, rank, "heir")
    third = arrive(model, rank, copies, workers.peers("a"), worker_id="b", blocks=_BLOCKS)
    for name, tensor in wanted.items():
        assert torch.equal(third.weights.named[name], tensor), name
    third.close()
    del shared
    new.close()


_DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_layer_that_is_cut_differently_is_not_shared(workers: Workers) -> None:
    """Its norms are the same, but would keep the whole old layer in memory."""
    model = small_model()
    old = held_whole(workers, model, "old", "a")
    rank = Rank(tp=2)
    copies = all_from("a", model, rank)
    new = arrive(model, rank, copies, workers.peers("a"), worker_id="a", blocks=_BLOCKS)
    norm = "model.layers.0.input_layernorm.weight"
    assert new.weights.named[norm].data_ptr() != old.weights.named[norm].data_ptr()
    assert torch.equal(new.weights.named[norm], old.weights.named[norm])
    old.close()
    new.close()


@pytest.mark.parametrize("remote", [False, True])
def test_a_copy_that_went_wrong_is_noticed(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """Without it, one flipped bit in a link is wrong text for as long as the replica lives."""
    model = small_model()
    old = held_whole(workers, model, "old", "a")

    class Faulty(Source):
        def pull(
            self, pieces: Sequence[Piece], *, verify: bool, between: Between, **more: Any
        ) -> int:
            assert verify
            count = super().pull(pieces, verify=False, between=between, **more)
            pieces[0].target.view(-1)[:1] += 1
            self._verify(pieces, between)
            return count

    monkeypatch.setattr("services.worker.engine.torch_engine.transfer.Source", Faulty)
    copies = all_from("a", model, Rank())
    peers = workers.peers("a", remote=remote)
    with pytest.raises(EngineFailed, match=r"differs from that of old on worker a"):
        arrive(model, Rank(), copies, peers, worker_id="b", blocks=_BLOCKS, verify=True)
    old.close()


@pytest.mark.parametrize("remote", [False, True])
def test_a_stop_is_heard_between_two_pieces(workers: Workers, remote: bool) -> None:
    """A replica of many gigabytes that nobody wants any more must not be fetched to its end."""
    model = small_model(hidden=512, intermediate=4096, layers=2)
    old = held_whole(workers, model, "old", "a")
    weights = allocate_weights(model, Rank(), dtype=torch.float32, device=CPU)
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        raise EngineFailed("stopped")

    with pytest.raises(EngineFailed, match="stopped"):
        fetch_weights(
            weights, all_from("a", model, Rank()), workers.peers("a", remote=remote),
            worker_id="b", stage=0, verify=False, between=stop,
        )  # fmt: skip
    assert calls == 1
    assert sum(bool(tensor.any()) for tensor in weights.named.values()) < len(weights.named)
    old.close()


@pytest.mark.parametrize("remote", [False, True])
def test_progress_is_expected_of_a_copy_and_not_of_a_wait(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """A rank that hangs in a copy would hang its replica; and one whose source stands still would
    be blamed for it."""
    model = small_model()
    old = held_whole(workers, model, "old", "a")
    weights = allocate_weights(model, Rank(), dtype=torch.float32, device=CPU)
    mine, doing, waited = threading.get_ident(), [False], 0
    receive = PeerLink.recv_fds

    def told(busy: bool) -> None:
        doing[0] = busy

    def noted(
        link: PeerLink, timeout_s: float | None = None, **options: int
    ) -> tuple[bytes, list[int]]:
        nonlocal waited
        if threading.get_ident() == mine:
            waited += 1
            assert not doing[0], "it waits for the source"
        return receive(link, timeout_s, **options)

    def between() -> None:
        assert doing[0], "it copies"

    monkeypatch.setattr(PeerLink, "recv_fds", noted)
    fetch_weights(
        weights, all_from("a", model, Rank()), workers.peers("a", remote=remote),
        worker_id="b", stage=0, verify=True, between=between, busy=told,
    )  # fmt: skip
    assert not doing[0]
    assert waited > 4
    old.close()


@pytest.mark.parametrize(("segments", "size"), [(1, 4097), (1, 0), (0, 4096), (2, 4096)])
def test_memory_that_is_not_as_said_is_refused(workers: Workers, segments: int, size: int) -> None:
    """To read beyond the end of a segment would kill this worker; and each descriptor that is not
    closed brings it nearer to its limit."""
    entry = TensorEntry("t", 0, 0, (4,), (1,), "layer", 0, None, 0, 0, 1)
    segment = MemorySegment.create("short")
    segment.extend(4096)
    asked = threading.Event()

    def serve(link: PeerLink, _: bytes) -> None:
        link.send(msgspec.msgpack.encode(TensorTable("x", "cpu", "float32", 1, (entry,))))
        link.recv()
        sizes = (size,) if segments < 2 else (size, size)
        link.send(msgspec.msgpack.encode(Answer(sizes=sizes)), [segment.fd] * segments)
        asked.set()

    workers["a"].offer("tensors/old", serve)
    source = connect_source(workers.peers("a"), "a", "old", worker_id="b")
    gc.collect()
    before = descriptors()
    with pytest.raises(PeerLost, match="segments are not as it says"):
        source.view("t")
    assert asked.wait(10)
    source.close()
    gc.collect()
    assert descriptors() <= before


def test_a_source_that_is_gone_is_peer_lost(workers: Workers) -> None:
    """The switcher rolls back on it; any other error would look like a fault of ours."""
    model = small_model()
    old = held_whole(workers, model, "old", "a")
    old.close()
    copies = all_from("a", model, Rank())
    for peers in (workers.peers("a"), {}):
        with pytest.raises(PeerLost):
            arrive(model, Rank(), copies, peers, worker_id="b", blocks=_BLOCKS)


def test_a_source_without_the_slice_is_named(workers: Workers) -> None:
    """A plan made for another placement must not fill a shard with a neighbour's rows."""
    model = small_model()
    full = noise(weight_shards(model, Rank()), torch.float32, 1)
    full |= noise(kv_shards(model, Rank(), blocks=_BLOCKS, block_tokens=4), torch.float32, 2)
    half = hold(
        model, Rank(tp=2), full, server=workers["a"],
        replica_id="old", worker_id="a", blocks=_BLOCKS,
    )  # fmt: skip
    with pytest.raises(EngineFailed, match="were planned to come from it"):
        arrive(
            model, Rank(), all_from("a", model, Rank()), workers.peers("a"),
            worker_id="b", blocks=_BLOCKS,
        )  # fmt: skip
    half.close()


def test_what_no_copy_brings_is_refused() -> None:
    """It would stay zero, and nobody would see why the text is wrong."""
    model = small_model()
    shards = weight_shards(model, Rank())
    copies = [copy for copy in all_from("a", model, Rank()) if copy.sheet != "mlp"]
    mlp = areas_of(model.shape("model", "float32"), Rank())["mlp"]
    first, second = Area(mlp.layers, (0, 10)), Area(mlp.layers, (11, mlp.units[1]))
    check_covered(shards, [*copies, Copy("mlp", mlp, "a", "old")])
    with pytest.raises(EngineFailed, match=r"gate_proj.weight from 10"):
        check_covered(shards, [*copies, Copy("mlp", first, "a", ""), Copy("mlp", second, "a", "")])


def test_the_disk_brings_parts_of_tensors() -> None:
    """A rank may have half of a shard from a neighbour, and the rest from nobody."""
    model = small_model()
    weights = allocate_weights(model, Rank(tp=2, tp_rank=1), dtype=torch.float32, device=CPU)
    copy = Copy("mlp", Area((1, 2), (15, 22)), DISK)
    later = Copy("mlp", Area((2, 3), (15, 22)), DISK, stage=1)
    parts = disk_parts(weights, [copy, later], stage=0)
    assert {shard.name for shard, _ in parts} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    for shard, target in parts:
        assert (shard.start, shard.stop) == (15, 22)
        assert tuple(target.shape) == shard.shape
        whole = next(one for one in weights.shards if one.name == shard.name)
        assert target.data_ptr() == within(weights.named[shard.name], whole, (15, 22)).data_ptr()


def test_stages_fetch_once_and_free_what_has_gone(workers: Workers) -> None:
    """Old and new do not fit side by side: the old layers must go before the next ones come."""
    model = small_model(layers=2)
    old = held_whole(workers, model, "staged", "a")
    assert old.exports is not None
    loaded: list[int] = []

    def load(stage: int) -> dict[str, int]:
        loaded.append(stage)
        if stage == 3:
            raise PeerLost("worker c is gone")
        return {}

    going = WeightStages(old.weights, old.arena, old.exports, load=load)
    assert not going.advance(StageOrder(1, (0, 1))).failure
    assert not loaded, "a replica that goes has fetched"
    assert list(old.weights.layers) == [1]
    assert not mapped_bytes("staged-model.layers.0")
    assert not any(name.startswith("model.layers.0") for name in old.exports.names())
    assert any(name.startswith("kv.layers.0") for name in old.exports.names())
    coming = WeightStages(old.weights, old.arena, old.exports, load=load)
    for stage in (1, 1, 2):
        assert not coming.advance(StageOrder(stage, (0, 0))).failure
    assert loaded == [1, 2]
    assert "worker c" in coming.advance(StageOrder(3, (0, 0))).failure
    old.close()


def test_an_old_placement_is_planned_from_any_holder() -> None:
    """The planner of these tests would otherwise leave routes untried."""
    model = small_model(kv_heads=1, heads=4)
    old = Placed("old", Parallelism(4, 1), ["a", "b", "c", "d"])
    copies = plan(model, [old], Rank(), random.Random(3))
    assert len({copy.source for copy in copies if copy.sheet == "kv"}) > 1


def test_a_layer_takes_memory_from_its_stage_on(workers: Workers, tmp_path: Path) -> None:
    """Otherwise old and new weights would stand side by side where they do not fit."""
    model = small_model()
    old = held_whole(workers, model, "old", "a")
    shape = model.shape("model", "float32")
    copies = [
        Copy(sheet, Area((layer, layer + 1), area.units), "a", "old", stage)
        for sheet, area in areas_of(shape, Rank()).items()
        if sheet != "cache"
        for layer in range(*area.layers)
        # The last layers first, the edges in between.
        for stage in [model.layers - 1 - layer if area.layers[1] > 1 else 1]
    ]
    arena = Arena("staged")
    origin = Origin(folder=tmp_path, worker_id="b", copies=copies, peers=workers.peers(["a"]))
    loader = WeightLoader(model, Rank(), arena, origin, dtype=torch.float32, device=CPU)
    of_layer = sum(t.nbytes for name, t in old.weights.named.items() if ".layers.0." in name)
    edges = sum(t.nbytes for name, t in old.weights.named.items() if ".layers." not in name)
    assert arena.allocated_bytes == 0
    for stage, expected in enumerate((of_layer, 2 * of_layer + edges, 3 * of_layer + edges)):
        loader.load(stage)
        loader.load(stage)
        assert arena.allocated_bytes == expected
    assert list(loader.weights.layers) == [0, 1, 2]
    for name, tensor in old.weights.named.items():
        assert torch.equal(loader.weights.named[name], tensor)
    assert loader.fetch_s > 0
    arena.close()


@pytest.mark.parametrize("remote", [False, True])
def test_progress_grows_piece_by_piece_and_a_failure_takes_it_back(
    workers: Workers, tmp_path: Path, remote: bool
) -> None:
    """A bar would stand at nothing and jump to the end; or count what came twice."""
    model = small_model(hidden=512, intermediate=4096, layers=2)
    old = held_whole(workers, model, "old", "a")
    copies = [copy for copy in all_from("a", model, Rank()) if copy.sheet != "cache"]
    seen: list[int] = []

    def look() -> None:
        seen.append(sum(loader.fetched.values()))
        if len(seen) == 3:
            raise PeerLost("gone")

    arena, peers = Arena("new"), workers.peers("a", remote=remote)
    origin = Origin(folder=tmp_path, worker_id="b", copies=copies, peers=peers, between=look)
    loader = WeightLoader(model, Rank(), arena, origin, dtype=torch.float32, device=CPU)
    with pytest.raises(PeerLost):
        loader.load(0)
    assert loader.fetched == {}
    assert loader.load(0) == loader.fetched
    assert 0 < seen[0] < seen[1] < seen[2] < sum(loader.fetched.values()) == seen[-1]
    arena.close()
    old.close()
