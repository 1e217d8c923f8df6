"""Brings a rank its weights along the copies that the switcher has planned.

A copy names an area of a sheet; here it becomes slices of all tensors of that sheet in those
layers. What this worker holds already under the very same intervals is not copied at all: the new
replica takes the old one's memory over, and whoever is left frees it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena, Place
from services.worker.engine.torch_engine.exports import Exports, Part, TensorEntry
from services.worker.engine.torch_engine.pieces import Piece
from services.worker.engine.torch_engine.sharding import TensorShard
from services.worker.engine.torch_engine.source import (
    ANSWER_S,
    Between,
    Busy,
    Source,
    unwatched,
)
from services.worker.engine.torch_engine.weights import Allocate, StageWeights
from shared.errors import EngineFailed, PeerLost
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import Span


def no_pause() -> None:
    """Nobody wants to stop the work between two pieces."""


def fetch_weights(  # noqa: PLR0913  # what a switch says of its copies
    weights: StageWeights,
    copies: Sequence[Copy],
    peers: Mapping[str, str],
    *,
    worker_id: str,
    stage: int,
    verify: bool,
    between: Between = no_pause,
    busy: Busy = unwatched,
    arrived: Callable[[str, int], None] = lambda _source, _count: None,
    arena: Arena | None = None,
) -> dict[str, int]:
    """Fill ``weights`` along the copies of ``stage`` that have a worker as their source; bytes by
    source, those of ``worker_id`` itself being in place. ``between`` is called every few MiB and
    may raise to stop; ``arrived`` with a source and bytes that came from it; ``busy`` as in
    Source.pull. ``arena``: where the weights lie. Raises PeerLost, and EngineFailed where a source
    holds something else."""
    fetched: dict[str, int] = defaultdict(int)
    for (source_id, replica_id), part in _by_source(copies, stage).items():
        source = connect_source(peers, source_id, replica_id, worker_id=worker_id)
        try:
            for copy in part:
                pieces, in_place = _pieces(weights, copy, source, arena)
                arrived(source_id, in_place)
                came = partial(arrived, source_id)
                pulled = source.pull(
                    pieces, verify=verify, between=between, busy=busy, arrived=came
                )
                fetched[source_id] += pulled + in_place
        finally:
            source.close()
    return dict(fetched)


def disk_parts(
    weights: StageWeights, copies: Sequence[Copy], *, stage: int
) -> list[tuple[TensorShard, Tensor]]:
    """What has to come from the checkpoint, as parts of shards, and where each of them goes."""
    return [
        (
            replace(shard, start=span[0], stop=span[1]),
            within(weights.named[shard.name], shard, span),
        )
        for copy in copies
        if copy.source == DISK and copy.stage == stage
        for shard, span in covered(weights.shards, copy)
    ]


def check_covered(shards: Iterable[TensorShard], copies: Sequence[Copy]) -> None:
    """Raises EngineFailed where the copies, of all stages, leave part of a tensor unfilled: it
    would be noise, and nobody would notice."""
    spans: dict[str, list[Span]] = defaultdict(list)
    wanted = list(shards)
    for copy in copies:
        for shard, span in covered(wanted, copy):
            spans[shard.name].append(span)
    for shard in wanted:
        reached = shard.start
        for start, stop in sorted(spans[shard.name]):
            if start <= reached:
                reached = max(reached, stop)
        if reached < shard.stop or not spans[shard.name]:
            raise EngineFailed(
                f"no copy brings {shard.name} from {reached} of {shard.start} to {shard.stop}"
            )


def covered(shards: Iterable[TensorShard], copy: Copy) -> Iterator[tuple[TensorShard, Span]]:
    """The shards that ``copy`` brings part of, and which elements along their axis; (0, 0) for
    those that are not cut."""
    for shard in shards:
        layer = shard.layer or 0
        if shard.sheet != copy.sheet or not copy.area.layers[0] <= layer < copy.area.layers[1]:
            continue
        if shard.axis is None:
            yield shard, (0, 0)
            continue
        first, last = (unit * shard.unit for unit in copy.area.units)
        span = max(first, shard.start), min(last, shard.stop)
        if span[0] < span[1]:
            yield shard, span


def connect_source(
    peers: Mapping[str, str],
    source_id: str,
    replica_id: str,
    *,
    worker_id: str,
    answer_s: float = ANSWER_S,
) -> Source:
    """``answer_s`` as in Source.connect. Raises PeerLost."""
    address = peers.get(source_id, "")
    if not address:
        raise PeerLost(f"worker {source_id} has no address, and holds part of {replica_id}")
    return Source.connect(
        address,
        worker_id=source_id,
        replica_id=replica_id,
        own=source_id == worker_id,
        answer_s=answer_s,
    )


def part_of(entry: TensorEntry, span: Span) -> Part:
    """Elements ``span`` of the full tensor, in the source's own coordinates. Raises EngineFailed
    if it does not hold them."""
    begin, end = [0] * len(entry.shape), list(entry.shape)
    if entry.axis is not None:
        if not entry.start <= span[0] < span[1] <= entry.stop:
            raise EngineFailed(
                f"the source holds {entry.name} from {entry.start} to {entry.stop}, and {span[0]} "
                f"to {span[1]} were planned to come from it"
            )
        begin[entry.axis], end[entry.axis] = span[0] - entry.start, span[1] - entry.start
    return Part(entry.name, tuple(begin), tuple(end))


def adopting(
    arena: Arena,
    shards: Sequence[TensorShard],
    copies: Sequence[Copy],
    peers: Mapping[str, str],
    *,
    worker_id: str,
) -> Allocate:
    """``arena.allocate``, but for tensors that this worker holds already, all of them: these are
    shared with the replica that they are to come from. Raises PeerLost."""
    found: dict[str, tuple[Exports, Tensor]] = {}
    own = [copy for copy in copies if copy.source == worker_id]
    for replica_id in sorted({copy.replica_id for copy in own}):
        source = connect_source(peers, worker_id, replica_id, worker_id=worker_id)
        try:
            if source.exports is not None:
                same = _same(shards, [c for c in own if c.replica_id == replica_id], source)
                found |= _whole_segments(source.exports, same)
        finally:
            source.close()

    def allocate(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str
    ) -> Tensor:
        if name in found:
            exports, tensor = found[name]
            whole = tensor.untyped_storage().nbytes() == math.prod(shape) * dtype.itemsize
            if whole and tensor.dtype == dtype and tensor.device.type == device.type:
                strides = torch.empty(shape, device="meta").stride()
                return arena.adopt(exports.arena, tensor.as_strided(shape, strides, 0), name)
        return arena.allocate(shape, dtype, device, name)

    return allocate


def free_layers(weights: StageWeights, arena: Arena, exports: Exports | None, layers: Span) -> None:
    """Let go of the weights of those ``layers`` that the rank has. It can run no more, and goes on
    serving its KV cache."""
    for layer in [layer for layer in weights.layers if layers[0] <= layer < layers[1]]:
        if exports is not None:
            exports.remove([shard.name for shard in weights.shards if shard.layer == layer])
        weights.free_layer(layer)
        arena.free_layer(layer)


def _by_source(copies: Sequence[Copy], stage: int) -> dict[tuple[str, str], list[Copy]]:
    """Of the weights; ordered, so that each source is visited once."""
    found: dict[tuple[str, str], list[Copy]] = defaultdict(list)
    for copy in copies:
        if copy.stage == stage and copy.source != DISK and copy.sheet != "cache":
            found[copy.source, copy.replica_id].append(copy)
    return found


def _pieces(
    weights: StageWeights, copy: Copy, source: Source, arena: Arena | None
) -> tuple[list[Piece], int]:
    """What to copy, and the bytes that need not be because both share the memory."""
    pieces: list[Piece] = []
    in_place = 0
    for shard, span in covered(weights.shards, copy):
        entry = source.entries.get(shard.name)
        if entry is None:
            raise PeerLost(
                f"{copy.replica_id} on worker {copy.source} has no {shard.name} (any more)"
            )
        target = within(weights.named[shard.name], shard, span)
        part = part_of(entry, span)
        shared = None if source.exports is None else source.exports.tensor(shard.name)
        if shared is not None and part.cut(shared).data_ptr() == target.data_ptr():
            in_place += target.nbytes
        else:
            pieces.append(Piece(part, target, fresh=arena))
    return pieces, in_place


def within(tensor: Tensor, shard: TensorShard, span: Span) -> Tensor:
    """The part of our tensor that is elements ``span`` of the full one."""
    if shard.axis is None:
        return tensor
    return tensor.narrow(shard.axis, span[0] - shard.start, span[1] - span[0])


def _same(shards: Sequence[TensorShard], own: Sequence[Copy], source: Source) -> set[str]:
    """Names of the tensors that the source holds under the same interval as we shall, and that
    the copies bring from there entirely."""
    same: set[str] = set()
    for copy in own:
        for shard, span in covered(shards, copy):
            entry = source.entries.get(shard.name)
            wanted = shard.axis, shard.start, shard.stop
            whole = span == (shard.start, shard.stop)
            if entry is not None and whole and (entry.axis, entry.start, entry.stop) == wanted:
                same.add(shard.name)
    return same


def _whole_segments(exports: Exports, same: set[str]) -> dict[str, tuple[Exports, Tensor]]:
    """Those of ``same`` that share their memory with nothing else: else one small tensor that is
    still wanted would keep the memory of a whole layer."""
    members: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name in exports.names():
        tensor = exports.tensor(name)
        place: Place | None = None if tensor is None else exports.arena.place(tensor)
        if tensor is not None and place is not None:
            members[id(place.block.segment or place.block.tensor)].append((name, tensor))
    return {
        name: (exports, tensor)
        for group in members.values()
        if all(name in same for name, _ in group)
        for name, tensor in group
    }
