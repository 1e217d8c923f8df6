"""Settings of a vLLM engine that is to be measured, readable without vLLM."""

import msgspec

from shared.errors import ConfigInvalid

_DTYPES = ("float32", "float16", "bfloat16")


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one vLLM engine runs. Zero means "derive it", as each comment says."""

    dtype: str = "float32"
    block_tokens: int = 32  # on a CPU, a multiple of 32
    kv_memory_bytes: int = 512 * 2**20
    batch_tokens_max: int = 2048
    running_max: int = 128
    context_tokens_max: int = 0  # 0: the checkpoint's

    def validate(self) -> None:
        """Raises ConfigInvalid for the first setting that cannot work."""
        if self.dtype not in _DTYPES:
            raise ConfigInvalid(
                field="dtype", value=self.dtype, remedy=f"use one of {', '.join(_DTYPES)}"
            )
        for field in ("block_tokens", "kv_memory_bytes", "batch_tokens_max", "running_max"):
            if getattr(self, field) < 1:
                raise ConfigInvalid(
                    field=field, value=getattr(self, field), remedy="use a positive number"
                )
        if self.context_tokens_max < 0:
            raise ConfigInvalid(
                field="context_tokens_max",
                value=self.context_tokens_max,
                remedy="use 0 or a positive number",
            )
        if self.batch_tokens_max < self.running_max:
            raise ConfigInvalid(
                field="batch_tokens_max",
                value=self.batch_tokens_max,
                remedy=f"raise it to running_max ({self.running_max}) or more, since each running "
                "request decodes one token per step",
            )
