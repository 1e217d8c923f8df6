"""Small random checkpoints of several families, and what transformers makes of them.

Typed loosely on purpose: the oracle is, and tests build settings by name.
"""

import shutil
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.engine import load_torch_engine
from services.worker.engine.torch_engine.leader import TorchEngine
from services.worker.engine.torch_engine.make_model import make_model
from shared.messages.requests import SamplingParams
from tests.support.rank_threads import ThreadReplica

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own
    import transformers

# The oracle is typed loosely and only read here.
hf: Any = cast("Any", transformers)
_safetensors: Any = cast("Any", safetensors.torch)


def load_file(path: Path) -> dict[str, Tensor]:
    return _safetensors.load_file(path)


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    _safetensors.save_file(tensors, path)


_SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "uneven": (
        "Llama",
        {
            "hidden_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 97,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "uneven-tied": (
        "Qwen3",
        {
            "hidden_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Oracle:
    folder: Path
    model: Any

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        return list(_greedy(self.model, tuple(prompt), tokens))

    def logits(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0]


@cache  # several tests ask for the same texts, and the oracle is slow
def _greedy(model: Any, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(made[0, len(prompt) :].tolist())


def make_oracle(folder: Path, family: str, **save: Any) -> Oracle:
    """Write a checkpoint with transformers itself, our tokenizer beside it."""
    make_model(folder)
    for written in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / written).unlink()
    name, changes = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**_SHAPE, **changes})
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            spread = 0.3 if tensor.ndim == 1 else 1.5 / tensor.shape[1] ** 0.5
            tensor.normal_(1.0 if "norm" in tensor_name else 0.0, spread, generator=generator)
    model.save_pretrained(folder, **save)
    return Oracle(folder, model)


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def load(folder: Path, **settings: Any) -> TorchEngine:
    settings.setdefault("threads", 1)
    if "kv_memory_bytes" not in settings:
        settings.setdefault("kv_blocks", 256)
    return load_torch_engine(folder, TorchEngineConfig(**settings))


def load_ranks(folder: Path, shape: str, **settings: Any) -> ThreadReplica:
    """As ``load``, with a thread for each rank."""
    settings = {"threads": 1, "kv_blocks": 256} | settings
    return ThreadReplica(folder, shape, TorchEngineConfig(**settings))


def greedy_request(key: str, prompt: list[int], tokens: int, **sampling: Any) -> EngineRequest:
    wanted: dict[str, Any] = {"output_tokens_max": tokens, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(**(wanted | sampling))
    return EngineRequest(key=key, prompt_tokens=prompt, sampling=params)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    tokens = torch.randint(0, 256, (length,), generator=generator)
    return cast("list[int]", tokens.tolist())  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
