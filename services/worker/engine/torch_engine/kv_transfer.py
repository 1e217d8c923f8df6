"""One rank's part of taking KV cache over: its rectangle of layers x heads, block by block.

The rectangle may come from several workers of the old replica. Which block goes where is the
leader's to say; both sides cut blocks of the same number of tokens.
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from services.worker.engine.torch_engine.exports import Part
from services.worker.engine.torch_engine.pieces import Piece
from services.worker.engine.torch_engine.sharding import TensorShard
from services.worker.engine.torch_engine.source import Between, Busy, Source, unwatched
from services.worker.engine.torch_engine.transfer import (
    connect_source,
    covered,
    no_pause,
    part_of,
    within,
)
from shared.errors import EngineFailed, PeerLost
from shared.placement.copies import Copy

SOURCE_S = 2.0
"""How long a source may take over one answer. The thread that waits also runs the replica's steps,
and a source that lives answers at once: a dead one is given up, and its requests are replayed."""


class PullOrder(msgspec.Struct, frozen=True, array_like=True):
    """Copy block ``theirs[i]`` of ``replica_id`` to ``own[i]``. With ``last`` nothing more will be
    asked of that replica."""

    replica_id: str
    theirs: list[int]
    own: list[int]
    last: bool


class Pulled(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did of an order: bytes by source worker, or why it could not."""

    worker_id: str
    bytes_by_source: dict[str, int]
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """Where part of one of our tensors comes from: ``part`` of the source, all its blocks."""

    part: Part
    target: Tensor


class KvTransfer:
    """Pulls KV cache into ``named`` tensors. ``expect`` may be called from another thread."""

    def __init__(
        self,
        shards: Sequence[TensorShard],
        named: Mapping[str, Tensor],
        *,
        worker_id: str,
        between: Between = no_pause,
        busy: Busy = unwatched,
    ) -> None:
        """``shards``: of the KV cache, under the names of ``named``. ``busy`` as in Source.pull."""
        self._shards, self._named = shards, named
        self._worker_id = worker_id
        self._between, self._busy = between, busy
        self._lock = threading.Lock()
        self._expected: tuple[dict[str, list[Copy]], dict[str, str], bool] = ({}, {}, False)
        self._stale = False  # what is open was opened for an earlier expectation
        self._open: dict[str, list[tuple[Source, list[_Route]]]] = {}  # by replica

    @property
    def block_bytes(self) -> int:
        """Of one block, in all layers of this rank."""
        return sum(tensor[:1].nbytes for tensor in self._named.values())

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """See Engine; replaces what was expected before."""
        by_replica: dict[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            if copy.sheet == "cache":
                by_replica[copy.replica_id].append(copy)
        with self._lock:
            self._expected = dict(by_replica), dict(peers), verify
            self._stale = True

    def pull(self, order: PullOrder) -> Pulled:
        """Do our part. Never raises for what is wrong with the source; then nothing of the order
        is to be relied on."""
        pulled: dict[str, int] = defaultdict(int)
        with self._lock:
            verify, stale, self._stale = self._expected[2], self._stale, False
        if stale:
            self.close()
        try:
            for source, routes in self._sources(order) if order.own else ():
                pieces = [_piece(route, order) for route in routes]
                pulled[source.worker_id] += source.pull(
                    pieces, verify=verify, between=self._between, busy=self._busy
                )
        except (
            PeerLost,
            EngineFailed,
            RuntimeError,
        ) as error:  # torch's, of a handle not to be had
            self.forget(order.replica_id)
            return Pulled(self._worker_id, {}, str(error))
        except BaseException:
            self.forget(order.replica_id)
            raise
        if order.last:
            self.forget(order.replica_id)
        return Pulled(self._worker_id, dict(pulled))

    def forget(self, replica_id: str) -> None:
        """Unmap that replica's cache."""
        for source, _ in self._open.pop(replica_id, ()):
            source.close()

    def close(self) -> None:
        """Unmap everything."""
        for replica_id in list(self._open):
            self.forget(replica_id)

    def _sources(self, order: PullOrder) -> list[tuple[Source, list[_Route]]]:
        """Connected once, and kept until the last order. Raises PeerLost and EngineFailed."""
        replica_id = order.replica_id
        if replica_id not in self._open:
            with self._lock:
                expected, peers, _ = self._expected
            copies = expected.get(replica_id, [])
            self._check_covered(replica_id, copies)
            opened = self._open[replica_id] = []
            for worker_id in sorted({copy.source for copy in copies}):
                source = connect_source(
                    peers,
                    worker_id,
                    replica_id,
                    worker_id=self._worker_id,
                    answer_s=SOURCE_S,
                )
                routes: list[_Route] = []
                opened.append((source, routes))
                for copy in copies:
                    if copy.source == worker_id:
                        routes += self._routes(copy, source)
        return self._open[replica_id]

    def _routes(self, copy: Copy, source: Source) -> list[_Route]:
        routes: list[_Route] = []
        for shard, span in covered(self._shards, copy):
            entry = source.entries.get(shard.name)
            if entry is None:
                raise PeerLost(f"{copy.replica_id} on worker {copy.source} has no {shard.name}")
            theirs, own = entry.shape[1], shard.full_shape[1]
            if theirs != own:
                raise EngineFailed(
                    f"{copy.replica_id} on worker {copy.source} has KV blocks of {theirs} tokens, "
                    f"and this replica of {own}: give both the same block_tokens"
                )
            target = within(self._named[shard.name], shard, span)
            routes.append(_Route(part=part_of(entry, span), target=target))
        return routes

    def _check_covered(self, replica_id: str, copies: Sequence[Copy]) -> None:
        """Copies of a plan do not overlap, so it is enough to count."""
        wanted = {shard.name: shard.stop - shard.start for shard in self._shards}
        for copy in copies:
            for shard, (start, stop) in covered(self._shards, copy):
                wanted[shard.name] -= stop - start
        if any(wanted.values()):
            raise EngineFailed(f"no copies were planned for all of the KV cache of {replica_id}")


def _piece(route: _Route, order: PullOrder) -> Piece:
    """The blocks as one slice where they lie so on both sides, else one by one."""
    part, first = route.part, order.theirs[0]
    count = len(order.own)
    if _consecutive(order.theirs) and _consecutive(order.own):
        begin, end = (first, *part.begin[1:]), (first + count, *part.end[1:])
        start = order.own[0]
        return Piece(Part(part.name, begin, end), route.target[start : start + count])
    rows = msgspec.structs.replace(part, rows=tuple(order.theirs))
    return Piece(rows, route.target, tuple(order.own))


def _consecutive(blocks: Sequence[int]) -> bool:
    return all(later - earlier == 1 for earlier, later in itertools.pairwise(blocks))
