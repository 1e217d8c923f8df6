"""Takes requests over from another replica, with their KV cache; and weights in stages.

The leader decides which request gets which blocks and tells all ranks which of the old replica's
blocks go there; each rank pulls its own part. While the old replica still runs, only blocks are
copied that are full: nothing writes to them as long as the request keeps its admission. What was
copied for another admission is copied again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import msgspec

from services.worker.engine.interface import LiveState, Taken
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler
from services.worker.engine.torch_engine.commands import command
from services.worker.engine.torch_engine.kv_transfer import KvTransfer, Pulled, PullOrder
from services.worker.engine.torch_engine.stages import Staged, StageOrder, WeightStages
from shared.errors import PeerLost
from shared.placement.copies import Copy

PULL, STAGE = 1, 2
"""Tags of what the leader tells its followers."""

AHEAD_BYTES_MAX = 64 * 2**20
"""What one call copies on this rank while the old replica still runs, so that the caller's other
work never waits for long."""

_ANSWER_S = 60.0
"""For a follower's answer; one that is gone or stuck is noticed long before by the session."""


_TOO_LONG = "longer than the KV cache"
_NO_ROOM = "no KV blocks or no row free"

_Answer = TypeVar("_Answer", Pulled, Staged)


class Followers(Protocol):
    """The part of a LeaderSession that a takeover needs."""

    def broadcast(self, payload: bytes) -> None: ...
    def recv(self, rank: int, timeout_s: float) -> bytes: ...


class FollowerLink(Protocol):
    """The part of a FollowerSession that it needs."""

    def send(self, payload: bytes) -> None: ...


@dataclass(slots=True)
class _Arrival:
    """A request whose KV cache is on its way: ``copied`` blocks are here, all of ``admission``."""

    replica_id: str
    admission: int = -1
    copied: int = 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Blocks ``[first, stop)`` of a request are to be copied, to ``own`` ones."""

    state: LiveState
    own: list[int]
    first: int
    stop: int


class Takeover:
    """The leader's side. ``followers`` are the other ranks, ``size`` - 1 of them."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        kv: KvTransfer,
        stages: WeightStages,
        *,
        followers: Followers | None = None,
        size: int = 1,
    ) -> None:
        self._scheduler = scheduler
        self._kv, self._stages = kv, stages
        self._followers, self._size = followers, size
        self._arrivals: dict[str, _Arrival] = {}
        self._confirmed: set[str] = set()
        self._mapped: set[str] = set()  # replicas whose cache some rank has open
        self._block_bytes: dict[str, int] = {}  # by replica: of one block, from other workers

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """See Engine; each rank is told its own."""
        self._kv.expect(copies, peers, verify=verify)

    def take(self, replica_id: str, states: Sequence[LiveState], *, final: bool) -> Taken:
        """See Engine. With ``final``, what cannot be copied is replayed, and so is what this
        replica can never run, for want of KV cache: it is held, and fails when it is let go on.
        Without, PeerLost is raised, and what was copied ahead is forgotten."""
        self._drop(replica_id, keep={state.request.key for state in states})
        wanted, replayed, reasons = self._reserve(replica_id, states, final=final)
        if not final:
            wanted = self._bite(wanted)
        answers = self._pull(replica_id, wanted, last=final)
        failures = sorted({answer.failure for answer in answers if answer.failure})
        if failures and not final:
            self._drop(replica_id, keep=set())
            raise PeerLost(failures[0])
        reasons.update(failures)
        for one in wanted:
            if failures and one.first < one.stop:
                replayed.append(one.state.request.key)
                self._hold_without_cache(one.state)
            else:
                self._arrivals[one.state.request.key].copied = one.stop
        if not final:
            return Taken(bytes_by_source=_bytes(answers))
        without = set(replayed)
        moved = [key for one in wanted if (key := one.state.request.key) not in without]
        self._confirmed.update(moved, replayed)
        for key in (*moved, *replayed):
            self._arrivals.pop(key, None)
        blocks = sum(one.stop for one in wanted if one.state.request.key not in without)
        return Taken(
            moved=moved,
            replayed=replayed,
            bytes_by_source=_bytes(answers),
            bytes_needed=blocks * self._block_bytes.get(replica_id, 0),
            detail="; ".join(sorted(reasons)),
        )

    def settle(self) -> None:
        """Before held requests are released: forget those that no final call has confirmed, and let
        go of the old replicas' memory. Raises RankLost."""
        for replica_id in sorted(self._mapped):
            self._pull(replica_id, (), last=True)
        for key in set(self._scheduler.held) - self._confirmed:
            self._scheduler.forget_held(key)
        self._arrivals.clear()
        self._confirmed.clear()
        self._block_bytes.clear()

    def advance_stage(self, stage: int, layers: tuple[int, int]) -> None:
        """See Engine; of all ranks. Raises PeerLost and EngineFailed."""
        order = StageOrder(stage, layers)
        self._tell(STAGE, order)
        try:
            staged = [self._stages.advance(order)]
        finally:
            answers = self._answers(Staged)
        for answer in (*staged, *answers):
            if answer.failure:
                raise PeerLost(answer.failure)

    def close(self) -> None:
        self._kv.close()

    def _can_run(self, state: LiveState) -> bool:
        """If not now, then when the KV cache has grown."""
        request = state.request
        tokens_max = len(request.prompt_tokens) + request.sampling.output_tokens_max
        return self._scheduler.kv.fits_ever(tokens_max)

    def _drop(self, replica_id: str, *, keep: set[str]) -> None:
        """Forget what came from ``replica_id`` and is not to be kept."""
        for key, arrival in list(self._arrivals.items()):
            if arrival.replica_id == replica_id and key not in keep:
                del self._arrivals[key]
                self._scheduler.forget_held(key)

    def _reserve(
        self, replica_id: str, states: Iterable[LiveState], *, final: bool
    ) -> tuple[list[_Wanted], list[str], set[str]]:
        """Blocks for as many as fit, oldest first: what to copy, whom to replay, and why."""
        wanted: list[_Wanted] = []
        replayed: list[str] = []
        reasons: set[str] = set()
        for state in states:
            key = state.request.key
            # Of a request that waits nothing is copied, and so nothing is lost: it is moved.
            able = self._can_run(state)
            if key not in self._scheduler.held:  # it gave way, or was aborted
                self._arrivals.pop(key, None)
            own: list[int] | None = None
            if able and (state.computed or final):
                own = self._scheduler.take(state, ahead=not final)
            if own is None:
                self._arrivals.pop(key, None)
                self._scheduler.forget_held(key)
                if final:
                    replayed.append(key)
                    self._hold_without_cache(state)
                    reasons.add(_NO_ROOM if able else _TOO_LONG)
                continue
            arrival = self._arrivals.setdefault(key, _Arrival(replica_id))
            if arrival.admission != state.admission:
                arrival.admission, arrival.copied = state.admission, 0
            tokens = self._scheduler.kv.block_tokens
            stop = -(-state.computed // tokens) if final else state.computed // tokens
            stop = min(stop, len(own))  # copied ahead it may have fewer, until more are free
            # A block that was full, and copied, does not change; the one after it may have.
            wanted.append(_Wanted(state, own, min(arrival.copied, stop), stop))
        return wanted, replayed, reasons

    def _bite(self, wanted: Iterable[_Wanted]) -> list[_Wanted]:
        """As much of it as one call copies ahead."""
        room = max(1, AHEAD_BYTES_MAX // max(1, self._kv.block_bytes))
        bite: list[_Wanted] = []
        for one in wanted:
            stop = min(one.stop, one.first + room)
            room -= stop - one.first
            bite.append(replace(one, stop=stop))
        return bite

    def _pull(self, replica_id: str, wanted: Iterable[_Wanted], *, last: bool) -> list[Pulled]:
        """All ranks at once. Raises RankLost."""
        theirs: list[int] = []
        own: list[int] = []
        for one in wanted:
            theirs += one.state.blocks[one.first : one.stop]
            own += one.own[one.first : one.stop]
        assert len(theirs) == len(own), "a request has fewer blocks than tokens computed"
        order = PullOrder(replica_id, theirs, own, last)
        if not own and not (last and replica_id in self._mapped):
            return []
        if last:
            self._mapped.discard(replica_id)
        else:
            self._mapped.add(replica_id)
        self._tell(PULL, order)
        try:
            pulled = self._kv.pull(order)
        finally:
            answers = self._answers(Pulled)
        if own and not any(answer.failure for answer in (pulled, *answers)):
            moved = _between_workers((pulled, *answers))
            self._block_bytes[replica_id] = moved // len(own)
        return [pulled, *answers]

    def _hold_without_cache(self, state: LiveState) -> None:
        held = self._scheduler.take(replace(state, computed=0, blocks=[]))
        assert held is not None, "a request without blocks always fits"

    def _tell(self, tag: int, order: msgspec.Struct) -> None:
        if self._followers is not None:
            self._followers.broadcast(command(tag, msgspec.msgpack.encode(order)))

    def _answers(self, kind: type[_Answer]) -> list[_Answer]:
        """Of all followers: whoever was told is heard, or the next answer would be mistaken."""
        if self._followers is None:
            return []
        return [
            msgspec.msgpack.decode(self._followers.recv(rank, _ANSWER_S), type=kind)
            for rank in range(1, self._size)
        ]


class TakeoverFollower:
    """A follower's side: ``handlers`` obey the leader's commands, by tag."""

    def __init__(self, kv: KvTransfer, stages: WeightStages, leader: FollowerLink) -> None:
        self._kv, self._stages, self._leader = kv, stages, leader

    @property
    def handlers(self) -> Mapping[int, Callable[[bytes], None]]:
        """Made when asked for: kept here they would be a cycle, and the tensors stay until some
        later garbage collection."""
        return {PULL: self._pull, STAGE: self._advance}

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """See Engine."""
        self._kv.expect(copies, peers, verify=verify)

    def close(self) -> None:
        self._kv.close()

    def _pull(self, body: bytes) -> None:
        order = msgspec.msgpack.decode(body, type=PullOrder)
        self._leader.send(msgspec.msgpack.encode(self._kv.pull(order)))

    def _advance(self, body: bytes) -> None:
        order = msgspec.msgpack.decode(body, type=StageOrder)
        self._leader.send(msgspec.msgpack.encode(self._stages.advance(order)))


def _between_workers(answers: Iterable[Pulled]) -> int:
    return sum(
        count
        for answer in answers
        for source, count in answer.bytes_by_source.items()
        if source != answer.worker_id
    )


def _bytes(answers: Iterable[Pulled]) -> dict[str, dict[str, int]]:
    return {
        answer.worker_id: answer.bytes_by_source for answer in answers if answer.bytes_by_source
    }
