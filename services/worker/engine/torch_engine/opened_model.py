"""A checkpoint's facts joined with the engine's settings, before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from services.worker.engine.torch_engine import sizing
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.kv_cache import BlockTable, KvBlocks
from services.worker.engine.torch_engine.model_config import ModelConfig, read_model_config


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A checkpoint's facts, as the engine's settings want them computed."""

    folder: Path
    facts: ModelConfig
    config: TorchEngineConfig
    context_tokens: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def open(cls, path: str | Path, config: TorchEngineConfig) -> "OpenedModel":
        """Raises ConfigInvalid for a bad folder or setting."""
        config.validate()
        folder = Path(path)
        facts = read_model_config(folder)
        context_tokens = sizing.context_tokens(facts, config)
        device = sizing.device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        return cls(
            folder=folder,
            facts=facts,
            config=config,
            context_tokens=context_tokens,
            dtype=sizing.dtype(facts, config),
            device=device,
        )

    def scheduler(self, blocks: int, full: int, stages: int) -> BatchScheduler:
        """``blocks`` of KV cache to begin with, ``full`` in the end."""
        config = self.config
        kv = KvBlocks(
            blocks=blocks,
            blocks_full=full,
            block_tokens=config.block_tokens,
            rows=config.running_max,
            row_tokens_max=self.context_tokens,
        )
        return BatchScheduler(
            kv,
            batch_tokens_max=config.batch_tokens_max,
            running_max=config.running_max,
            waiting_max=config.waiting_max,
            micro_batches=stages,
        )

    def block_table(self, blocks: int) -> BlockTable:
        """As the leader's."""
        return BlockTable(
            blocks=blocks,
            block_tokens=self.config.block_tokens,
            rows=self.config.running_max,
            row_tokens_max=self.context_tokens,
        )
