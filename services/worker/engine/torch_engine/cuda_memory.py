"""Memory of a GPU that another process on it maps: CUDA IPC, as torch.multiprocessing does it.

The handle goes as plain fields instead of torch's pickle: a peer must not be able to run code here.
"""

from typing import Any, cast

import msgspec
import torch
from torch import Tensor


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """What ``UntypedStorage._share_cuda_`` says of a storage."""

    device: int
    handle: bytes
    size_bytes: int
    offset_bytes: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_sync: bool


def share(tensor: Tensor) -> Handle:
    """A handle of the tensor's storage, to be opened once. The memory stays until it was."""
    storage = cast("Any", tensor.untyped_storage())
    return Handle(*storage._share_cuda_())  # torch has no public name for it


def open_handle(handle: Handle) -> Tensor:
    """The storage as a flat tensor of bytes, in another process than the one that shared it."""
    torch.cuda.init()  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    opener = cast("Any", torch.UntypedStorage)
    fields = msgspec.structs.astuple(handle)
    storage = opener._new_shared_cuda(*fields)  # noqa: SLF001  # torch has no public name for it
    device = torch.device("cuda", handle.device)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
