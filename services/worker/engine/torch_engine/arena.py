"""Where a rank's weights and KV cache lie: memory that other workers can read without our help.

On a CPU each layer's weights and each layer's KV cache are one memory segment of their own, so that
a layer can be freed while its neighbours are still needed, and nothing is committed before the
first write. On a GPU each tensor is the device's own allocation, shared by CUDA IPC when asked.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.torch_engine.shared_memory import MemorySegment, viewed

_LAYER = re.compile(r"^(?:.*\.)?layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation. ``offset``: in bytes into ``segment``, None on a GPU."""

    tensor: Tensor
    segment: MemorySegment | None
    offset: int

    @property
    def size(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: in which group of which kind of memory, and at which byte of it."""

    block: Block
    group: str
    offset: int


class Arena:
    """The allocations of one rank, in groups that are freed together (``group_of``). Not for two
    threads at once, but ``place`` and reading a tensor may run beside the thread that computes."""

    def __init__(self, label: str) -> None:
        """``label`` names the memory to whoever looks into /proc."""
        self._label = label
        self._groups: dict[str, list[Block]] = {}
        self._segments: dict[str, MemorySegment] = {}  # of the groups, while they grow
        self._blocks: dict[int, tuple[str, Block]] = {}  # by address of the storage

    def allocate(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str
    ) -> Tensor:
        """A tensor for ``name``: zeros on a CPU, whatever was there before on a GPU."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if device.type != "cpu" or not size:
            return self._keep(name, torch.empty(shape, dtype=dtype, device=device), None, 0)
        group = group_of(name)
        segment = self._segments.get(group)
        if segment is None:
            segment = self._segments[group] = MemorySegment.create(f"{self._label}-{group}")
        offset = segment.extend(size)
        memory = segment.map(offset=offset, size=size, writable=True)
        strides = torch.empty(shape, dtype=dtype, device="meta").stride()
        tensor = viewed(memory, dtype, offset=0, shape=shape, strides=strides)
        return self._keep(name, tensor, segment, offset)

    def adopt(self, other: "Arena", tensor: Tensor, name: str) -> Tensor:
        """Hold a tensor of another arena of this process as one's own, without a copy. It stays
        until both have freed it."""
        place = other.place(tensor)
        assert place is not None, f"{name} does not lie in the other arena"
        return self._keep(name, tensor, place.block.segment, place.block.offset)

    def place(self, tensor: Tensor) -> Place | None:
        """Where ``tensor``, or what it is a view of, lies; None if not here (or freed)."""
        address = tensor.untyped_storage().data_ptr()
        found = self._blocks.get(address)
        if found is None:
            return None
        group, block = found
        inner = int(tensor.storage_offset()) * tensor.element_size()
        return Place(block, group, block.offset + inner)

    @property
    def allocated_bytes(self) -> int:
        """What was asked for, touched or not."""
        return sum(block.size for blocks in self._groups.values() for block in blocks)

    @property
    def committed_bytes(self) -> int:
        """What takes memory now."""
        segments: dict[int, MemorySegment] = {}
        on_device = 0
        for blocks in self._groups.values():
            for block in blocks:
                if block.segment is None:
                    on_device += block.size
                else:
                    segments[id(block.segment)] = block.segment
        return on_device + sum(segment.committed_bytes for segment in segments.values())

    def free_layer(self, layer: int) -> None:
        """Forget the weights of ``layer``; its KV cache stays. The memory goes with the last
        tensor over it, in this process or another."""
        self._free(f"model.layers.{layer}")

    def free_cache(self, layer: int) -> None:
        """Forget the KV cache of ``layer``; what is allocated for it next is other memory."""
        self._free(f"kv.layers.{layer}")

    def close(self) -> None:
        """Forget everything."""
        for group in list(self._groups):
            self._free(group)

    def _keep(
        self, name: str, tensor: Tensor, segment: MemorySegment | None, offset: int
    ) -> Tensor:
        group, block = group_of(name), Block(tensor, segment, offset)
        self._groups.setdefault(group, []).append(block)
        self._blocks[tensor.untyped_storage().data_ptr()] = (group, block)
        return tensor

    def _free(self, group: str) -> None:
        self._segments.pop(group, None)
        for block in self._groups.pop(group, ()):
            self._blocks.pop(block.tensor.untyped_storage().data_ptr(), None)


def group_of(name: str) -> str:
    """Tensors of one layer and kind belong together: ``model.layers.3.mlp.up_proj.weight`` to
    ``model.layers.3``, ``kv.layers.3.key`` to ``kv.layers.3``; others stand alone."""
    found = _LAYER.match(name)
    return name if found is None else found[0].removesuffix(".")
