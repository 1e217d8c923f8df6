"""What a rank offers of its tensors to whoever connects: a table, descriptors, bytes, checksums.

A peer on the same host gets descriptors of the memory and copies by itself; one elsewhere names
parts and gets their bytes. Nothing here waits for the thread that computes: who asks knows what
will not change under its hands.
"""

import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine import cuda_memory
from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.sharding import TensorShard
from services.worker.engine.torch_engine.shared_memory import MemorySegment
from services.worker.peers.link import PeerLink
from services.worker.peers.server import PeerServer
from shared.errors import PeerLost
from shared.placement.sheets import SheetName

BULK_BYTES_MAX = 8 * 2**20
"""Of one answer: bounds the buffers on both sides, and how late a stop is noticed."""

SEGMENTS_MAX = 64
"""Descriptors in one message; the kernel takes 253."""

_IDLE_S = 3600.0
"""A peer that holds a link open and says nothing for so long has forgotten it."""


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """A named tensor of one rank, ``[start, stop)`` of the full one as in TensorShard. It begins
    ``offset`` bytes into memory ``segment`` of the table."""

    name: str
    segment: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sheet: SheetName
    layer: int
    axis: int | None
    start: int
    stop: int
    unit: int


class TensorTable(msgspec.Struct, frozen=True):
    """``exporter`` is unique in the world; ``segments`` counts pieces of memory."""

    exporter: str
    device: str
    dtype: str
    segments: int
    entries: tuple[TensorEntry, ...]


class Part(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """``[begin, end)`` along every dimension of a tensor, in elements; or, where ``rows`` are
    given, these along the first one, in this order, instead of ``[begin[0], end[0])``."""

    name: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    rows: tuple[int, ...] = ()

    def cut(self, tensor: Tensor) -> Tensor:
        """A view, or a copy where there are rows."""
        spans = [slice(a, b) for a, b in zip(self.begin, self.end, strict=True)]
        if not self.rows:
            return tensor[tuple(spans)]
        index = torch.tensor(self.rows, device=tensor.device)
        return tensor[(slice(None), *spans[1:])].index_select(0, index)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = tuple(b - a for a, b in zip(self.begin, self.end, strict=True))
        return (len(self.rows), *sizes[1:]) if self.rows else sizes


class WantSegments(msgspec.Struct, frozen=True, tag=True):
    """Answered by their sizes with the descriptors, or by handles of a GPU's memory."""

    numbers: tuple[int, ...]


class WantBytes(msgspec.Struct, frozen=True, tag=True):
    """Answered in bulk: the parts' elements one after another, each in row-major order."""

    parts: tuple[Part, ...]


class WantChecksums(msgspec.Struct, frozen=True, tag=True):
    parts: tuple[Part, ...]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To each question; ``refusal`` says why there is nothing else (and no bulk)."""

    refusal: str = ""
    sizes: tuple[int, ...] = ()
    handles: tuple[cuda_memory.Handle, ...] = ()
    checksums: tuple[int, ...] = ()


_Memory = Callable[[], MemorySegment | Tensor | None]
"""A weak reference: a peer that keeps a link open for the KV cache must not keep freed weights."""

Question = WantSegments | WantBytes | WantChecksums
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)

_here: "weakref.WeakValueDictionary[str, Exports]" = weakref.WeakValueDictionary()
"""What this very process offers: its own memory needs no descriptor, nor could CUDA IPC open it."""


def topic_of(replica_id: str) -> str:
    return f"tensors/{replica_id}"


def exported_here(exporter: str) -> "Exports | None":
    """What ``exporter`` of a table is, if it is in this process."""
    return _here.get(exporter)


class Exports:
    """One rank's tensors under their names, offered by ``server``. Thread-safe."""

    def __init__(self, server: PeerServer, arena: Arena, *, replica_id: str) -> None:
        self.arena = arena
        self.name = f"{os.getpid()}-{id(self)}-{os.urandom(8).hex()}"
        self._server, self._topic = server, topic_of(replica_id)
        self._lock = threading.Lock()
        self._shut, self._reopened = False, threading.Condition(self._lock)
        self._tensors: dict[str, tuple[TensorShard, Tensor]] = {}
        self._links: set[PeerLink] = set()
        _here[self.name] = self
        server.offer(self._topic, self._serve)

    def add(self, shards: Iterable[TensorShard], named: Mapping[str, Tensor]) -> None:
        """Offer ``named`` tensors, each as its shard says, to who connects from now on."""
        with self._lock:
            self._tensors |= {shard.name: (shard, named[shard.name]) for shard in shards}

    def remove(self, names: Iterable[str]) -> None:
        """Offer them no more, and let go of them."""
        with self._lock:
            for name in names:
                self._tensors.pop(name, None)

    def shut(self) -> bool:
        """Keep whoever connects waiting until ``reopen``; False, and nothing done, if somebody is
        connected."""
        with self._lock:
            if not self._links:
                self._shut = True
            return self._shut

    def reopen(self) -> None:
        with self._lock:
            self._shut = False
            self._reopened.notify_all()

    def tensor(self, name: str) -> Tensor | None:
        with self._lock:
            found = self._tensors.get(name)
        return None if found is None else found[1]

    def names(self) -> list[str]:
        with self._lock:
            return list(self._tensors)

    def close(self) -> None:
        """Whoever still copies gets PeerLost."""
        self._server.withdraw(self._topic, self._serve)
        self.reopen()
        _here.pop(self.name, None)
        with self._lock:
            self._tensors.clear()
            links = list(self._links)
        for link in links:
            link.close()

    def _serve(self, link: PeerLink, _hello: bytes) -> None:
        """Answer one peer until it goes."""
        with self._lock:
            self._reopened.wait_for(lambda: not self._shut)
            self._links.add(link)
        try:
            self._converse(link)
        finally:
            with self._lock:
                self._links.discard(link)

    def _converse(self, link: PeerLink) -> None:
        memories: list[_Memory] = []
        link.send(msgspec.msgpack.encode(self._table(memories)))
        while True:
            try:
                question = _questions.decode(link.recv(_IDLE_S))
            except PeerLost:
                return  # it has what it wanted
            self._answer(link, question, memories)

    def _answer(self, link: PeerLink, question: Question, memories: Sequence[_Memory]) -> None:
        if isinstance(question, WantSegments):
            _share(link, [memories[number]() for number in question.numbers])
            return
        tensors = [self.tensor(part.name) for part in question.parts]
        found = [
            part.cut(tensor)
            for part, tensor in zip(question.parts, tensors, strict=True)
            if tensor is not None
        ]
        if len(found) < len(tensors):
            missing = next(
                p.name for p, t in zip(question.parts, tensors, strict=True) if t is None
            )
            link.send(msgspec.msgpack.encode(Answer(refusal=f"{missing} is not here any more")))
        elif isinstance(question, WantChecksums):
            answer = Answer(checksums=tuple(checksum(part) for part in found))
            link.send(msgspec.msgpack.encode(answer))
        else:
            link.send(msgspec.msgpack.encode(Answer()))
            link.send_bulk(_gathered(found).numpy().data)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch

    def _table(self, memories: list[_Memory]) -> TensorTable:
        """Fills ``memories``, which its entries number."""
        with self._lock:
            offered = list(self._tensors.values())
        numbers: dict[int, int] = {}
        entries: list[TensorEntry] = []
        device, dtype = "cpu", ""
        for shard, tensor in offered:
            place = self.arena.place(tensor)
            if place is None:
                continue  # freed by now
            memory = place.block.segment or place.block.tensor
            if id(memory) not in numbers:
                numbers[id(memory)] = len(memories)
                memories.append(weakref.ref(memory))
            device, dtype = tensor.device.type, dtype_name(tensor.dtype)
            entries.append(_entry(shard, tensor, numbers[id(memory)], place.offset))
        return TensorTable(self.name, device, dtype, len(memories), tuple(entries))


def checksum(part: Tensor) -> int:
    """CRC-32 of the elements in row-major order."""
    return zlib.crc32(as_bytes(part.cpu()).numpy().data)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch


def as_bytes(part: Tensor) -> Tensor:
    """The elements in row-major order as a flat tensor of bytes; a copy unless they lie so."""
    return part.contiguous().reshape(-1).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share(link: PeerLink, wanted: Sequence[MemorySegment | Tensor | None]) -> None:
    if any(memory is None for memory in wanted):
        link.send(msgspec.msgpack.encode(Answer(refusal="its memory is free by now")))
        return
    files = [memory for memory in wanted if isinstance(memory, MemorySegment)]
    handles = tuple(cuda_memory.share(memory) for memory in wanted if isinstance(memory, Tensor))
    answer = Answer(sizes=tuple(file.size for file in files), handles=handles)
    link.send(msgspec.msgpack.encode(answer), [file.fd for file in files])


def _gathered(parts: Sequence[Tensor]) -> Tensor:
    """On the CPU, as flat bytes; without a copy for what lies so already."""
    flat = [as_bytes(part) for part in parts]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).cpu()


def _entry(shard: TensorShard, tensor: Tensor, segment: int, offset: int) -> TensorEntry:
    return TensorEntry(
        name=shard.name,
        segment=segment,
        offset=offset,
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        sheet=shard.sheet,
        layer=shard.layer or 0,
        axis=shard.axis,
        start=shard.start,
        stop=shard.stop,
        unit=shard.unit,
    )
