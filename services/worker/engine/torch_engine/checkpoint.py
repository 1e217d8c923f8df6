"""Reads weights from a local Hugging Face folder, only the slices that a rank holds.

Every tensor is checked for presence and shape before the first byte is read, so that a bad folder
fails at once and says which file and tensor is at fault.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.worker.engine.torch_engine.model_config import read_json
from services.worker.engine.torch_engine.sharding import OUTPUT, TensorShard
from shared.errors import ConfigInvalid

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class _File(Protocol):
    """The part of safetensors' file object that we use; the package types it loosely."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


class Checkpoint:
    """The safetensors files of one folder, opened but not read."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigInvalid if a file is missing or damaged."""
        self._folder = folder
        self._files: dict[str, tuple[Path, _File]] = {}
        index = folder / _INDEX
        for path in self._indexed(index) if index.is_file() else [folder / _SINGLE]:
            if not path.is_file():
                raise self._missing_file(path)
            try:
                opened = cast("_File", safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ConfigInvalid(
                    field=path.name,
                    value=str(path),
                    remedy=f"truncated or not safetensors ({error}): copy the file again",
                ) from error
            self._files.update((name, (path, opened)) for name in opened.keys())  # noqa: SIM118  # not a dict

    def load(self, parts: Iterable[tuple[TensorShard, Tensor]]) -> int:
        """Fill each tensor with its shard's slice; the bytes read. Raises ConfigInvalid."""
        found = [(shard, target, self._slice(shard)) for shard, target in parts]
        with torch.inference_mode():
            for shard, target, part in found:
                assert tuple(target.shape) == shard.shape, (shard, target.shape)
                target.copy_(part[shard.index])
        return sum(target.nbytes for _, target, _ in found)

    def refuse_unknown(self, shards: list[TensorShard], *, tied_embeddings: bool) -> None:
        """Raises ConfigInvalid if a file holds weights that the whole model would not use: the
        model is then not what config.json says, and its output would be subtly wrong."""
        known = {shard.name for shard in shards}
        if tied_embeddings:
            known.add(OUTPUT)  # some files repeat it
        unknown = [
            name
            for name in sorted(self._files.keys() - known)
            if not name.endswith("rotary_emb.inv_freq")  # old Llama files; we compute it
        ]
        if unknown:
            raise ConfigInvalid(
                field=f"{self._files[unknown[0]][0].name}: {unknown[0]}",
                value=f"{len(unknown)} tensors that config.json does not imply",
                remedy="use the config.json that belongs to these weights, or the vllm engine",
            )

    def _slice(self, shard: TensorShard) -> _Slice:
        if shard.name not in self._files:
            raise ConfigInvalid(
                field=shard.name,
                value=str(self._folder),
                remedy="the safetensors files lack this tensor: copy all files of the checkpoint",
            )
        path, opened = self._files[shard.name]
        part = opened.get_slice(shard.name)
        if tuple(part.get_shape()) != shard.full_shape:
            raise ConfigInvalid(
                field=f"{path.name}: {shard.name}",
                value=tuple(part.get_shape()),
                remedy=f"config.json implies the shape {shard.full_shape}: "
                "use the config.json that belongs to these weights",
            )
        return part

    def _indexed(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigInvalid(
                field=f"{_INDEX}: weight_map",
                value=weight_map,
                remedy="must map tensors to files: copy the file again",
            )
        names = sorted({str(name) for name in cast("dict[str, object]", weight_map).values()})
        return [self._folder / name for name in names]

    def _missing_file(self, path: Path) -> ConfigInvalid:
        pickled = any(self._folder.glob("*.bin")) or any(self._folder.glob("*.pth"))
        return ConfigInvalid(
            field="model path",
            value=str(self._folder),
            remedy=f"{path.name} is missing: "
            + ("convert the weights to safetensors" if pickled else "copy all weight files"),
        )
