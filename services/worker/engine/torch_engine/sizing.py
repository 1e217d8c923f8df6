"""What the engine allocates, from its settings and the model; refuses what cannot agree."""

import torch

from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.sharding import kv_shards
from shared.errors import ConfigInvalid
from shared.placement.sheets import Rank

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float32,  # wider: bfloat16 would lose digits
}


def context_tokens(model: ModelConfig, config: TorchEngineConfig) -> int:
    asked = config.context_tokens_max or model.context_tokens
    if asked > model.context_tokens:
        raise ConfigInvalid(
            field="context_tokens_max",
            value=asked,
            remedy=f"the model was made for {model.context_tokens} tokens: use at most that",
        )
    if model.sliding_window is not None and asked > model.sliding_window:
        raise ConfigInvalid(
            field="context_tokens_max",
            value=asked,
            remedy=f"the model attends a sliding window of {model.sliding_window} tokens, which "
            "the torch engine does not compute beyond: use at most that, or the vllm engine",
        )
    return asked


def dtype(model: ModelConfig, config: TorchEngineConfig) -> torch.dtype:
    name = model.dtype if config.dtype == "auto" else config.dtype
    if name not in _DTYPES:
        raise ConfigInvalid(
            field="config.json: dtype", value=name, remedy='set the engine\'s dtype to "float32"'
        )
    return _DTYPES[name]


def device(name: str) -> torch.device:
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigInvalid(
            field="device",
            value=name,
            remedy=f'torch sees {torch.cuda.device_count()} CUDA devices: use "cpu", or install '
            "torch for CUDA and its driver",
        )
    return found


def kv_blocks(
    model: ModelConfig,
    config: TorchEngineConfig,
    rank: Rank,
    *,
    context_tokens: int,
    dtype: torch.dtype,
    bytes_max: int = 0,
) -> int:
    """As many as ``rank`` has memory for, never more than all rows could fill. ``bytes_max``: of
    the rank's cache; 0 as configured. Raises ConfigInvalid if that is not one."""
    shards = kv_shards(model, rank, blocks=1, block_tokens=config.block_tokens)
    block_bytes = sum(torch.Size(shard.shape).numel() for shard in shards) * dtype.itemsize
    limit = min(bytes_max or config.kv_memory_bytes, config.kv_memory_bytes) // block_bytes
    if config.kv_blocks:
        limit = min(config.kv_blocks, bytes_max // block_bytes if bytes_max else config.kv_blocks)
    if not limit:
        raise ConfigInvalid(
            field="kv_memory_bytes",
            value=bytes_max or config.kv_memory_bytes,
            remedy=f"one block of {config.block_tokens} tokens takes {block_bytes} bytes: raise it",
        )
    if config.kv_blocks:
        return limit
    return min(limit, config.running_max * -(-context_tokens // config.block_tokens))
