"""Settings of the torch engine, readable without torch so that any service can check them."""

import re

import msgspec

from shared.errors import ConfigInvalid

_DEVICE = re.compile(r"^(cpu|cuda(:\d+)?)$")
_DTYPES = ("auto", "float32", "bfloat16")


class TorchEngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one torch engine runs. Zero means "derive it", as each comment says."""

    dtype: str = "auto"  # auto: the checkpoint's (float16 is widened to float32)
    device: str = "cpu"
    threads: int = 0  # 0: torch's own choice
    block_tokens: int = 16  # tokens of one KV block
    kv_blocks: int = 0  # 0: as many as kv_memory_bytes holds
    kv_memory_bytes: int = 512 * 2**20
    batch_tokens_max: int = 512  # tokens computed in one step: bounds the step's time
    running_max: int = 64
    waiting_max: int = 256
    context_tokens_max: int = 0  # 0: the checkpoint's

    def validate(self) -> None:
        """Raises ConfigInvalid for the first setting that cannot work."""
        if self.dtype not in _DTYPES:
            raise ConfigInvalid(
                field="dtype", value=self.dtype, remedy=f"use one of {', '.join(_DTYPES)}"
            )
        if not _DEVICE.match(self.device):
            raise ConfigInvalid(
                field="device", value=self.device, remedy='use "cpu", "cuda" or "cuda:<index>"'
            )
        for field in ("threads", "kv_blocks", "context_tokens_max"):
            if getattr(self, field) < 0:
                raise ConfigInvalid(
                    field=field, value=getattr(self, field), remedy="use 0 or a positive number"
                )
        for field in (
            "block_tokens", "kv_memory_bytes", "batch_tokens_max", "running_max", "waiting_max",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ConfigInvalid(
                    field=field, value=getattr(self, field), remedy="use a positive number"
                )
        if self.batch_tokens_max < self.running_max:
            raise ConfigInvalid(
                field="batch_tokens_max",
                value=self.batch_tokens_max,
                remedy=f"raise it to running_max ({self.running_max}) or more, since each running "
                "request decodes one token per step",
            )
