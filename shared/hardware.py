"""The vocabulary of machines: GPUs, nodes, parallelism. No behaviour beyond parsing."""

import re

import msgspec

from shared.errors import ConfigInvalid

_PARALLELISM = re.compile(r"tp([1-9][0-9]{0,3})(?:pp([1-9][0-9]{0,3}))?")


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device as a worker owns it; ``kind`` is "cpu" for a virtual one."""

    gpu_id: str
    kind: str = "cpu"
    memory_bytes: int = 0


class Parallelism(msgspec.Struct, frozen=True, order=True):
    """Shape of a replica: tensor-parallel ranks times pipeline stages."""

    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}"

    @classmethod
    def parse(cls, text: str) -> "Parallelism":
        """Read ``tp4pp2`` or ``tp4``; raises ConfigInvalid."""
        match = _PARALLELISM.fullmatch(text)
        if match is None:
            raise ConfigInvalid(
                field="parallelism", value=text, remedy='write it as "tp4" or "tp4pp2"'
            )
        return cls(tp=int(match[1]), pp=int(match[2] or 1))
