"""The other end of ``exports``: another rank's tensors, from which parts are copied.

Three ways to the same bytes: tensors of this very process, memory of this host mapped through
descriptors, and a stream from another host.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine import cuda_memory
from services.worker.engine.torch_engine.exports import (
    BULK_BYTES_MAX,
    SEGMENTS_MAX,
    Answer,
    Exports,
    TensorEntry,
    TensorTable,
    WantBytes,
    WantChecksums,
    WantSegments,
    as_bytes,
    checksum,
    dtype_name,
    exported_here,
    topic_of,
)
from services.worker.engine.torch_engine.pieces import Piece, grouped, split
from services.worker.engine.torch_engine.shared_memory import MemorySegment, viewed
from services.worker.peers.link import PeerLink, connect
from shared.errors import EngineFailed, PeerLost

ANSWER_S = 10.0
"""How long a peer may take over one answer: 8 MiB at the slowest link that is of any use."""

_UNDER_WAY_MAX = 3
"""Questions asked ahead of their answers, so that the stream never waits for us."""

LOCAL_BYTES_MAX = 32 * 2**20
"""Copied at once on this host, which bounds how late a stop is noticed. Between two pieces a thread
that computes may keep this one waiting for the interpreter."""

Between = Callable[[], None]
"""Called between two pieces of work; raises to stop it."""

Busy = Callable[[bool], None]
"""Told when work begins that should show progress, and when it ends, or waits for a peer."""


def unwatched(busy: bool) -> None:
    """Nobody watches the progress."""


class Source:
    """What worker ``worker_id`` holds of ``replica_id``. Close it, also after an error."""

    def __init__(
        self,
        link: PeerLink,
        *,
        worker_id: str,
        replica_id: str,
        same_process: bool = False,
        answer_s: float = ANSWER_S,
    ) -> None:
        """Raises PeerLost. With ``same_process``, tensors that turn out to lie here are used as
        they are."""
        self.worker_id, self.replica_id = worker_id, replica_id
        self._link, self._answer_s = link, answer_s
        self._busy: Busy = unwatched
        self._table = msgspec.msgpack.decode(link.recv(answer_s), type=TensorTable)
        self.entries = {entry.name: entry for entry in self._table.entries}
        self.exports: Exports | None = None
        if same_process:
            self.exports = exported_here(self._table.exporter)
        self._memories: dict[int, Tensor] = {}  # mapped, as bytes

    @classmethod
    def connect(
        cls, address: str, *, worker_id: str, replica_id: str, own: bool, answer_s: float = ANSWER_S
    ) -> "Source":
        """``own``: it is our own worker. ``answer_s`` bounds each wait for it. Raises PeerLost."""
        link = connect(address, topic_of(replica_id), timeout_s=answer_s)
        try:
            return cls(
                link, worker_id=worker_id, replica_id=replica_id, same_process=own,
                answer_s=answer_s,
            )  # fmt: skip
        except BaseException:
            link.close()
            raise

    def close(self) -> None:
        """Unmaps everything, too."""
        self._memories.clear()
        self.exports = None
        self._link.close()

    def pull(
        self,
        pieces: Sequence[Piece],
        *,
        verify: bool,
        between: Between,
        busy: Busy = unwatched,
        arrived: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Copy them, and compare each with the source's own words if asked; the bytes copied.
        ``arrived`` is told of bytes as they come, which are then copied, and not compared yet.
        Not ``busy`` while the source is waited for: whose fault that is nobody here can tell.
        Raises PeerLost, EngineFailed for a checksum that differs, and what ``between`` raises."""
        self._busy = busy
        busy(True)
        try:
            return self._pull(pieces, verify, between, arrived)
        finally:
            self._busy = unwatched
            busy(False)

    def _pull(
        self,
        pieces: Sequence[Piece],
        verify: bool,
        between: Between,
        arrived: Callable[[int], None],
    ) -> int:
        local = self.local
        most = LOCAL_BYTES_MAX if local else BULK_BYTES_MAX
        small = [part for piece in pieces for part in split(piece, most)]
        if not small:
            return 0
        self._check_dtype(small[0].target.dtype)
        if local:
            for piece in small:
                piece.write(piece.part.cut(self.view(piece.part.name)))
                arrived(piece.size)
                between()
        else:
            self._stream(small, between, arrived)
        if small[0].target.is_cuda:  # the source may free it as soon as we say that we have it
            torch.cuda.current_stream(small[0].target.device).synchronize()
        if verify:
            self._verify(small, between)
        return sum(piece.size for piece in small)

    def view(self, name: str) -> Tensor:
        """The source's tensor itself, where it can be reached (``local``)."""
        entry = self._entry(name)
        if self.exports is not None:
            tensor = self.exports.tensor(name)
            if tensor is None:
                raise self._lost(f"{name} is not there any more")
            return tensor
        if entry.segment not in self._memories:
            self._map(entry.segment)
        return viewed(
            self._memories[entry.segment],
            getattr(torch, self._table.dtype),
            offset=entry.offset,
            shape=entry.shape,
            strides=entry.strides,
        )

    @property
    def local(self) -> bool:
        """Whether ``view`` works."""
        return self.exports is not None or self._link.local

    def _entry(self, name: str) -> TensorEntry:
        found = self.entries.get(name)
        if found is None:
            raise self._lost(f"it has no {name}")
        return found

    def _map(self, number: int) -> None:
        """Map segment ``number``, and those after it in the same message."""
        wanted = tuple(
            other
            for other in range(number, min(number + SEGMENTS_MAX, self._table.segments))
            if other not in self._memories
        )
        if self._table.device != "cpu":
            wanted = (number,)  # a handle must be opened exactly once: ask for what is needed
        answer, fds = self._ask(WantSegments(wanted))
        segments = [MemorySegment(fd) for fd in fds]  # which close them, whatever goes wrong
        if answer.handles:
            for other, handle in zip(wanted, answer.handles, strict=True):
                self._memories[other] = cuda_memory.open_handle(handle)
            return
        sizes = answer.sizes
        if not len(segments) == len(sizes) == len(wanted) or any(
            not 0 < size <= segment.size for segment, size in zip(segments, sizes, strict=True)
        ):  # reading beyond the end of one would kill this process
            raise self._lost(f"its segments are not as it says: {len(segments)} of {sizes} bytes")
        for other, segment, size in zip(wanted, segments, sizes, strict=True):
            self._memories[other] = segment.map(offset=0, size=size, writable=False)

    def _ask(self, question: WantSegments | WantChecksums) -> tuple[Answer, list[int]]:
        self._link.send(msgspec.msgpack.encode(question))
        with self._waiting():
            payload, fds = self._link.recv_fds(self._answer_s)
        try:
            return self._checked(payload), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _checked(self, payload: bytes) -> Answer:
        answer = msgspec.msgpack.decode(payload, type=Answer)
        if answer.refusal:
            raise self._lost(answer.refusal)
        return answer

    def _stream(
        self, pieces: Sequence[Piece], between: Between, arrived: Callable[[int], None]
    ) -> None:
        """Ask ahead, so that bytes flow all the time."""
        asked: deque[list[Piece]] = deque()

        def receive() -> None:
            group = asked.popleft()
            self._receive(group)
            arrived(sum(piece.size for piece in group))
            between()

        for group in grouped(pieces):
            question = WantBytes(tuple(piece.part for piece in group))
            self._link.send(msgspec.msgpack.encode(question))
            asked.append(group)
            if len(asked) == _UNDER_WAY_MAX:
                receive()
        while asked:
            receive()

    def _receive(self, group: Sequence[Piece]) -> None:
        with self._waiting():
            payload = self._link.recv(self._answer_s)
        self._checked(payload)
        target = group[0].target
        if (
            len(group) == 1
            and not group[0].rows
            and target.is_contiguous()
            and target.device.type == "cpu"
        ):
            self._fill(as_bytes(target))
            return
        staging = torch.empty(sum(piece.size for piece in group), dtype=torch.uint8)
        self._fill(staging)
        at = 0
        for piece in group:
            values = staging[at : at + piece.size].view(piece.target.dtype)
            piece.write(values.view(piece.part.shape))
            at += piece.size

    def _fill(self, buffer: Tensor) -> None:
        values: memoryview = buffer.numpy().data  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        with self._waiting():
            self._link.recv_bulk_into(values, self._answer_s)

    @contextlib.contextmanager
    def _waiting(self) -> Generator[None]:
        self._busy(False)
        try:
            yield
        finally:
            self._busy(True)

    def _verify(self, pieces: Sequence[Piece], between: Between) -> None:
        for group in grouped(pieces):
            if self.exports is not None:
                words = [checksum(p.part.cut(self.view(p.part.name))) for p in group]
            else:
                answer, _ = self._ask(WantChecksums(tuple(piece.part for piece in group)))
                words = list(answer.checksums)
            for piece, word in zip(group, words, strict=True):
                if checksum(piece.written()) != word:
                    raise EngineFailed(
                        f"{piece.part.name} differs from that of {self.replica_id} on worker "
                        f"{self.worker_id} after the copy of {piece.part.begin} to "
                        f"{piece.part.end}"
                    )
            between()

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype_name(dtype) != self._table.dtype:
            raise EngineFailed(
                f"{self.replica_id} on worker {self.worker_id} holds {self._table.dtype}, and "
                f"{dtype_name(dtype)} is needed: give both the same engine settings"
            )

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost(f"{self.replica_id} on worker {self.worker_id}: {reason}")
